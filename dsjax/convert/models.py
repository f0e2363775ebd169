"""Whether two descriptions are of the same model."""

import dataclasses

from dsjax.config import Model

# How weights were drawn before training, and how layers are grouped, is no part of what they are.
COMPARED = ("vocab_size", "hidden_size", "blocks", "mtp", "rms_norm_eps", "max_position_embeddings")


def differing_field(one: Model, other: Model) -> str | None:
    """Where the models first differ, as in `blocks.3.ffn.num_experts is 8 and 16`, if they do."""
    found = (_difference(name, getattr(one, name), getattr(other, name)) for name in COMPARED)
    return next((told for told in found if told), None)


def _difference(path: str, one: object, other: object) -> str | None:
    if one == other:
        return None
    if type(one) is not type(other):
        return f"{path} is {_short(one)} and {_short(other)}"
    if isinstance(one, tuple):
        if len(one) != len(other):
            return f"{path} are {len(one)} and {len(other)}"
        parts = ((f"{path}.{i}", *pair) for i, pair in enumerate(zip(one, other, strict=True)))
    elif dataclasses.is_dataclass(one):
        names = (field.name for field in dataclasses.fields(one))
        parts = ((f"{path}.{name}", getattr(one, name), getattr(other, name)) for name in names)
    else:
        return f"{path} is {one!r} and {other!r}"
    return next(told for part in parts if (told := _difference(*part)))


def _short(value: object) -> str:
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
