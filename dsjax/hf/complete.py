"""Complete or refused: the tensors that a checkpoint has against those that its model needs."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from dsjax import config
from dsjax.hf import fp8, names
from dsjax.hf.tensors import Tensor, placed, some
from dsjax.model import abstract

Shape = tuple[int, ...]
# Rows compared at a time between a tensor and its copy.
COMPARED = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """What is wrong, each tensor by name; `wrong` says shapes too. All empty: nothing is."""

    missing: list[str]
    unexpected: list[str]
    wrong: list[str]

    def check(self) -> None:
        """ValueError if there are any."""
        if self.missing:
            raise ValueError(
                f"the checkpoint lacks {len(self.missing)} tensors that its config.json asks for: "
                f"{some(self.missing)}"
            )
        if self.unexpected:
            raise ValueError(
                f"the checkpoint has {len(self.unexpected)} tensors that its config.json has no "
                f"place for: {some(self.unexpected)}"
            )
        if self.wrong:
            raise ValueError(
                f"{len(self.wrong)} tensors have another shape than config.json says: "
                f"{some(self.wrong)}"
            )


@functools.lru_cache(maxsize=4)
def weights(model: config.Model) -> dict[str, tuple[names.Source, Shape]]:
    """Every weight of `model` by its dotted path: what it is made of, and its shape."""
    module = abstract(model)
    sources = names.sources(module, model)
    return {path: (sources[path], tuple(v.shape)) for path, v in names.variables(module)}


def needed(model: config.Model) -> dict[str, Shape]:
    """The hub tensors that make up `model`, without copies."""
    shapes: dict[str, Shape] = {}
    for source, shape in weights(model).values():
        shapes |= dict.fromkeys(source.names.flat, source.hub_shape(shape))
    return shapes


def differences(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], copies: Mapping[str, str]
) -> Differences:
    """`tensors` (FP8 scales not among them) against those `wanted`; `copies` may be absent."""
    unexpected = sorted(tensors.keys() - wanted.keys() - copies.keys())
    shapes = {**wanted, **{copy: wanted[original] for copy, original in copies.items()}}
    return Differences(
        missing=sorted(wanted.keys() - tensors.keys()),
        unexpected=[name for name in unexpected if not names.IGNORED.fullmatch(name)],
        wrong=[
            f"{placed(name, tensors[name])} is {tuple(tensors[name].shape)}, not {shape}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    )


def without_absent_mtp(tensors: Mapping[str, Tensor], model: config.Model) -> config.Model:
    """`model` without its MTP layers if no tensor of theirs is there: many copies lack them."""
    beyond = tuple(f"model.layers.{model.num_layers + k}." for k in range(len(model.mtp)))
    if not beyond or any(name.startswith(beyond) for name in tensors):
        return model
    return dataclasses.replace(model, mtp=())


def checked(tensors: Mapping[str, Tensor], model: config.Model) -> config.Model:
    """`model`, without MTP layers that are absent, if `tensors` (with FP8 scales) make it up.

    ValueError names tensors that are missing, unexpected or of another shape.
    """
    weights = {name: t for name, t in tensors.items() if not name.endswith(fp8.SCALE)}
    model = without_absent_mtp(weights, model)
    differences(weights, needed(model), names.copies(model)).check()
    return model


def check_copies(tensors: Mapping[str, Tensor], copies: Mapping[str, str]) -> None:
    """ValueError if a copy that is there differs from its original. Reads both."""
    for copy, original in copies.items():
        if copy in tensors and not _equal(tensors[copy], tensors[original]):
            raise ValueError(
                f"{copy} differs from {original}; MTP shares embedding and head with the main "
                "model, so they must be equal"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compared a few rows at a time: these are the largest tensors there are."""
    rows = one.shape[0]
    parts = (slice(row, min(row + COMPARED, rows)) for row in range(0, rows, COMPARED))
    return all(np.array_equal(one[part, slice(None)], other[part, slice(None)]) for part in parts)
