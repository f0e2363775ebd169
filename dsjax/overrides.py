"""Single leaves of a `Run` changed from the command line: `override(run, "optim.beta1=0.8")`.

A key walks through fields by name and through tuples of components by number
(`model.layers.1.repeat=4`). The field's annotation says what a text may mean; nothing is guessed.
"""

import ast
import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator
from typing import NamedTuple

from dsjax.run import Run


class Leaf(NamedTuple):
    """One settable value: its full key, the annotation of its field, and what it is now."""

    key: str
    type: object
    value: object


def override(run: Run, *assignments: str) -> Run:
    """`run` with every `key=value` applied at once, so values that only fit together can change.

    Of two assignments to one key the later wins. Raises ValueError for an unknown key (naming the
    right ones and the closest), for a value of another type, and for what a component refuses.
    """
    changes = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"{assignment!r} is no override; write key=value, like steps=20")
        changes[tuple(key.split("."))] = text
    for path in changes:
        for length in range(1, len(path)):
            if path[:length] in changes:
                whole, part = ".".join(path[:length]), ".".join(path)
                raise ValueError(f"{whole}= and {part}= contradict each other; give one of them")
    return _changed(run, (), changes, leaves(run))


def leaves(run: Run) -> list[Leaf]:
    """Every key that `override` takes, depth first in the order of the fields."""
    return [leaf for leaf in _walk(run, "") if not _is_branch(leaf.value)]


def help_text(run: Run) -> str:
    """The leaves as a table of key, type and present value, for `--help`."""
    rows = [(leaf.key, type_name(leaf.type), repr(leaf.value)) for leaf in leaves(run)]
    key_width, type_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{key:<{key_width}}  {kind:<{type_width}}  {now}" for key, kind, now in rows)


def fit(value: object, wanted: object, key: str) -> object:
    """`value` as the annotation `wanted` has it: an int serves as float, a list as tuple.

    Anything else of another type raises a ValueError that begins with `key`.
    """
    with contextlib.suppress(_Misfit):
        return _fitted(value, wanted)
    hint = ""
    if components := [o.__name__ for o in _options(wanted) if dataclasses.is_dataclass(o)]:
        hint = (
            f"; a whole {' or '.join(components)} is written in a run file, "
            f"the command line changes its fields ({key}.…=)"
        )
    raise ValueError(f"{key} wants {type_name(wanted)}, got {value!r}{hint}")


def type_name(annotation: object) -> str:
    """An annotation as written in the source, without module names."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return re.sub(r"(\w+\.)+(?=\w)", "", str(annotation))


class _Misfit(Exception):
    """The value is not of the type that was tried."""


def _options(wanted: object) -> tuple[object, ...]:
    is_union = typing.get_origin(wanted) in (types.UnionType, typing.Union)
    return typing.get_args(wanted) if is_union else (wanted,)


def _fitted(value: object, wanted: object) -> object:
    for option in _options(wanted):
        if typing.get_origin(option) is tuple and isinstance(value, (tuple, list)):
            items = typing.get_args(option)
            if items[-1] is Ellipsis:
                items = items[:1] * len(value)
            if len(items) == len(value):
                pairs = zip(value, items, strict=True)
                return tuple(_fitted(part, item) for part, item in pairs)
        elif option is float and type(value) is int:
            return float(value)
        elif type(value) is option:
            return value
    raise _Misfit


def _parse(text: str, wanted: object, key: str) -> object:
    options = _options(wanted)
    if text.lower() == "none" and types.NoneType in options:
        return None
    if str in options:
        return text
    if text.lower() in ("true", "false"):
        return fit(text.lower() == "true", wanted, key)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return fit(value, wanted, key)


def _is_branch(value: object) -> bool:
    """Whether keys lead further down: a component, or a tuple of components."""
    parts = value if isinstance(value, tuple) else (value,)
    return bool(parts) and all(dataclasses.is_dataclass(part) for part in parts)


def _children(node: object) -> dict[str, tuple[object, object]]:
    """Name -> (annotation, value) of what a key may name next; empty below a leaf."""
    if dataclasses.is_dataclass(node):
        return {f.name: (f.type, getattr(node, f.name)) for f in dataclasses.fields(node)}
    if _is_branch(node):
        return {str(index): (type(item), item) for index, item in enumerate(node)}
    return {}


def _walk(node: object, prefix: str) -> Iterator[Leaf]:
    for name, (annotation, value) in _children(node).items():
        yield Leaf(prefix + name, annotation, value)
        yield from _walk(value, f"{prefix}{name}.")


def _changed(
    node: object, path: tuple[str, ...], changes: dict[tuple[str, ...], str], known: list[Leaf]
) -> object:
    """`node`, which stands at `path`, rebuilt once with all the changes that lie below it."""
    children, below = _children(node), {}
    for name in dict.fromkeys(target[len(path)] for target in changes):
        here = (*path, name)
        key = ".".join(here)
        inside = {target: text for target, text in changes.items() if target[: len(here)] == here}
        if name not in children:
            raise ValueError(_unknown(next(iter(inside)), path, node, known))
        annotation, value = children[name]
        if here in inside:
            below[name] = _parse(inside[here], annotation, key)
        else:
            below[name] = _changed(value, here, inside, known)
    if isinstance(node, tuple):
        return tuple(below.get(str(index), item) for index, item in enumerate(node))
    try:
        return dataclasses.replace(node, **below)
    except ValueError as error:
        given = " ".join(f"{'.'.join(target)}={text}" for target, text in changes.items())
        raise ValueError(f"{given}: {error}") from error


def _unknown(
    target: tuple[str, ...], path: tuple[str, ...], node: object, known: list[Leaf]
) -> str:
    key, above = ".".join(target), ".".join(path)
    names = ", ".join(_children(node))
    if not names:
        rule = f"{above} is {node!r} and has no keys below it"
    elif isinstance(node, tuple):
        rule = f"{above} has items {names}"
    else:
        rule = f"{above or 'a run'} is a {type(node).__name__} with {names}"
    keys = [leaf.key for leaf in known]
    ends = [candidate for candidate in keys if candidate.endswith(f".{key}")]
    close = ends or difflib.get_close_matches(key, keys, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    return f"unknown key {key!r}: {rule}{guess}"
