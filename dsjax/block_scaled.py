"""Weights that stay as FP8 checkpoints store them: one byte a number, a scale for 128x128."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.quantize import dequantize_blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockScaled:
    """e4m3 `values` [stack..., N, K] and FP32 `scales` [stack..., ceil(N/128), ceil(K/128)].

    `layout` leads from there to the weight that a layer declares, as an einops pattern with the
    `widths` of axes that it unfolds: "... (n x) q -> ... q n x" and n=128. The dots stand for the
    stack of layers, which `lax.scan` takes apart. Takes a weight's place inside its variable.
    """

    values: Array
    scales: Array
    layout: str = field(metadata={"static": True})
    widths: tuple[tuple[str, int], ...] = field(default=(), metadata={"static": True})

    @property
    def ndim(self) -> int:
        """Of what is stored, as the axes of its variable are: `sharding` counts layers by both."""
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return jax.eval_shape(lambda weight: weight.whole(jnp.float32), self).shape

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return self.values.size

    def __getitem__(self, index) -> "BlockScaled":
        if index is not ...:
            raise TypeError(f"a weight in FP8 has no slice {index}; take one of `whole(dtype)`")
        return self

    def whole(self, dtype: DTypeLike) -> Array:
        """The weight, values times scales in FP32, rounded once to `dtype`."""
        lead, matrix = self.values.shape[:-2], self.values.shape[-2:]
        flat = (one.reshape(-1, *one.shape[-2:]) for one in (self.values, self.scales))
        wide = jax.vmap(lambda values, scales: dequantize_blocks(values, scales, dtype))(*flat)
        return rearrange(wide.reshape(*lead, *matrix), self.layout, **dict(self.widths))

    def matrices(self, stack: int = 0) -> list[tuple[Array, Array]]:
        """Values and scales of the matrices that stand side by side in the weight: gate and up.

        Each keeps `stack` leading axes.
        """
        beside = self.values.shape[stack:-2]
        return [
            (self.values[(slice(None),) * stack + at], self.scales[(slice(None),) * stack + at])
            for at in np.ndindex(beside)
        ]


def whole(w: Array | BlockScaled, dtype: DTypeLike) -> Array:
    """A weight as an array; one that is an array already stays what it is."""
    return w.whole(dtype) if isinstance(w, BlockScaled) else w
