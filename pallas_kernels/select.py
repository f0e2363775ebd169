"""Which implementation of an operation runs: its `implementation=` argument, `prefer`, or the first
that fits."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import jax

Implementations = Mapping[str, Callable]

# All names that tables of implementations use, so that a misspelt preference is an error.
NAMES = ("gpu", "tpu", "tpu_wide", "dequantize", "reference", "blocks", "ragged_dot")

# Part of the key of jax's caches: a function traced under one preference is traced again under
# another.
_preferred = jax.make_user_context(None)


class Unsupported(NotImplementedError):
    """This implementation does not do that shape, type or chip; another one may.

    A type of its own, so that what Pallas itself has not implemented is never taken for a reason to
    go on quietly with something slower.
    """


def prefer(name: str | None) -> AbstractContextManager:
    """A context in which `implementation=None` means `name`, for operations that have it.

    As with the argument, that implementation runs or raises. Safe around and inside `jax.jit`.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"implementation {name!r}; there are {', '.join(NAMES)}")
    return _preferred(name)


def named(op: str, table: Implementations, implementation: str | None) -> Callable | None:
    """The implementation of `op` that the argument names or else the context prefers, or None."""
    if implementation is None:
        return table.get(_preferred.value)
    if implementation not in table:
        raise ValueError(f"{op}: implementation {implementation!r}; there are {sorted(table)}")
    return table[implementation]


def run(op: str, table: Implementations, implementation: str | None, *args, **options):
    """Calls the one implementation that is named; or the first of `table` that takes the arguments.

    An implementation that does not raises `Unsupported`. When none does, all their reasons come in
    one ExceptionGroup.
    """
    chosen = named(op, table, implementation)
    if chosen is not None:
        return chosen(*args, **options)
    reasons = []
    for candidate in table.values():
        try:
            return candidate(*args, **options)
        except Unsupported as reason:
            reasons.append(reason)
    raise ExceptionGroup(f"no implementation of {op} takes these arguments here", reasons)
