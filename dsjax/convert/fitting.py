"""The smallest mesh whose devices hold a model's weights."""

import collections
import dataclasses
import math
from collections.abc import Mapping

from dsjax import config, sharding
from dsjax.hf import fp8, names
from dsjax.model import abstract
from dsjax.params import FullPrecision, RouterBias
from dsjax.plan import chips

# Bytes of memory per device, of which a TPU7x chip is two.
DEVICES = {chip.name: chip.hbm for chip in chips.CHIPS}
# What weights may take of it; activations and caches need the rest.
FOR_WEIGHTS = 0.9
MOST_DEVICES = 4096


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of ours: the mesh axes that cut each dimension, at rest and while it is used.

    Of a stack of `layers` one layer at a time is used, together with the others of its `group`.
    """

    group: str
    layers: int
    shape: tuple[int, ...]
    itemsize: float
    stored: tuple[tuple[str, ...], ...]
    used: tuple[tuple[str, ...], ...]

    def bytes_per_device(self, sizes: Mapping[str, int]) -> tuple[float, float] | None:
        """At rest and (one layer) in use, on a mesh of `sizes`; None if it does not divide."""
        stored, used = (
            [math.prod(sizes[axis] for axis in axes) for axes in cut]
            for cut in (self.stored, self.used)
        )
        if any(n % parts for n, parts in zip(self.shape, stored, strict=True)):
            return None
        total = math.prod(self.shape) * self.itemsize
        return total / math.prod(stored), total / self.layers / math.prod(used)


def weights(model: config.Model, *, is_fp8: bool) -> list[Weight]:
    """Every weight of `model` as it lies in the memory of devices, in FP8 or BF16."""
    module = abstract(model)
    sources = names.sources(module, model)
    result = []
    for path, variable in names.variables(module):
        itemsize = 2.0
        if isinstance(variable, FullPrecision | RouterBias):
            itemsize = 4.0
        elif is_fp8 and fp8.is_quantized(sources[path].names.flat[0]):
            itemsize = 1 + 4 / fp8.BLOCK**2
        parts = path.split(".")
        depth = {"layers": 4, "mtp": 2}.get(parts[0], len(parts))
        axes = (None,) * (variable.ndim - len(variable.axes)) + tuple(variable.axes)
        stored = tuple(sharding.RULES.get(axis, ()) for axis in axes)
        used = tuple(
            () if axis in sharding.GATHERED else cut for axis, cut in zip(axes, stored, strict=True)
        )
        layers = variable.shape[0] if "l" in sources[path].stacked else 1
        group = ".".join(parts[:depth])
        result.append(Weight(group, layers, tuple(variable.shape), itemsize, stored, used))
    return result


def smallest_mesh(weights: list[Weight], memory: float) -> tuple[int, int, float] | None:
    """(mesh.fsdp, mesh.expert, bytes per device) of the fewest devices that hold `weights`.

    Bytes are those at rest and of the largest layer, which is gathered to be used. Devices come
    in powers of two. None: no number of them up to MOST_DEVICES is enough.
    """
    whole = sum(math.prod(weight.shape) * weight.itemsize for weight in weights)
    for power in range(MOST_DEVICES.bit_length()):
        if whole / (1 << power) > memory * FOR_WEIGHTS:
            continue
        choices = []
        for expert in (1 << k for k in range(power + 1)):
            fsdp = (1 << power) // expert
            sizes = dict.fromkeys(sharding.AXES, 1) | {"fsdp": fsdp, "expert": expert}
            parts = [weight.bytes_per_device(sizes) for weight in weights]
            if None not in parts:
                in_use: dict[str, float] = collections.defaultdict(float)
                for weight, (_, used) in zip(weights, parts, strict=True):
                    in_use[weight.group] += used
                total = sum(stored for stored, _ in parts) + max(in_use.values())
                choices.append((total, fsdp, expert))
        if choices and min(choices)[0] <= memory * FOR_WEIGHTS:
            total, fsdp, expert = min(choices)
            return fsdp, expert, total
    return None
