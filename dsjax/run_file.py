"""A `Run` in files: the Python file that defines it, and JSON that gives it back unchanged."""

import dataclasses
import json
import runpy
from pathlib import Path

from dsjax import config
from dsjax import run as run_parts
from dsjax.overrides import fit, override, type_name
from dsjax.run import Run

TAG = "type"
COMPONENTS = {
    name: value
    for module in (config, run_parts)
    for name, value in vars(module).items()
    if isinstance(value, type) and dataclasses.is_dataclass(value)
}


def load(path: str | Path, *overrides: str) -> Run:
    """Runs the Python file at `path` and returns its `run`, with `key=value` overrides applied.

    Raises ValueError if there is no such file (and lists the run files there are), if it leaves no
    `Run` named `run` behind, or if an override does not fit.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(path.parent.glob("*.py")) or sorted(Path("configs").glob("*.py"))
        listed = ", ".join(str(file) for file in there) or "none in configs/ either"
        raise ValueError(f"no run file {str(path)!r}; there are: {listed}")
    names = runpy.run_path(str(path))
    found = names.get("run")
    if not isinstance(found, Run):
        what = f"its `run` is a {type(found).__name__}" if "run" in names else "it has no `run`"
        raise ValueError(f"{path} defines no run: {what}; write `run = Run(...)` in it")
    return override(found, *overrides)


def to_json(run: Run) -> str:
    """`run` as JSON text: a component is an object tagged with its type, a tuple is an array."""
    return json.dumps(plain(run), indent=1) + "\n"


def from_json(text: str) -> Run:
    """The `Run` that `to_json` wrote, equal to the original in every value and type.

    A field absent from the text takes its default, so runs stored before the field existed stay
    readable. Raises ValueError for an unknown type or field, and for a value that does not fit.
    """
    built = component(json.loads(text), "run")
    if not isinstance(built, Run):
        raise ValueError(f"the text describes {type_name(type(built))}, not a Run")
    return built


def plain(value: object) -> object:
    """A component of a run as what JSON can hold; `component` gives it back."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    name = type(value).__name__
    if COMPONENTS.get(name) is not type(value):
        raise ValueError(f"{name} is no component of dsjax.config or dsjax.run; define it there")
    fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {TAG: name, **fields}


def component(node: object, key: str) -> object:
    """The component that `plain` described; `key` is its name in errors."""
    if isinstance(node, list):
        return tuple(component(item, f"{key}.{index}") for index, item in enumerate(node))
    if not isinstance(node, dict):
        return node
    name = node.get(TAG)
    if name not in COMPONENTS:
        raise ValueError(f"{key} has unknown {TAG} {name!r}; known are {', '.join(COMPONENTS)}")
    fields = {f.name: f for f in dataclasses.fields(COMPONENTS[name])}
    given = {field: value for field, value in node.items() if field != TAG}
    required = {
        field
        for field, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    unknown, missing = given.keys() - fields.keys(), required - given.keys()
    if unknown or missing:
        raise ValueError(
            f"{key} does not describe a {name}: unknown fields {sorted(unknown)}, "
            f"missing fields {sorted(missing)}; was it written by another version?"
        )
    return COMPONENTS[name](
        **{
            field: fit(component(value, f"{key}.{field}"), fields[field].type, f"{key}.{field}")
            for field, value in given.items()
        }
    )
