"""The definition: each tile of 128 rows by its group's matrix, one tile at a time."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.fp8_matmul.reference import matmul
from pallas_kernels.quantize.shapes import BLOCK


def grouped_matmul(
    x_MK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    tile_groups: Array,
    *,
    out_dtype: DTypeLike,
) -> Array:
    """See `fp8_grouped_matmul`."""
    (M, K), N = x_MK.shape, w_GNK.shape[1]

    def tile(operands):
        x, scales, group = operands
        at = jnp.maximum(group, 0)
        y = matmul(x, scales, w_GNK[at], w_scales[at], out_dtype=out_dtype)
        return jnp.where(group >= 0, y, jnp.zeros_like(y))

    tiles = M // BLOCK
    x, scales = x_MK.reshape(tiles, BLOCK, K), x_scales.reshape(tiles, BLOCK, x_scales.shape[1])
    return lax.map(tile, (x, scales, tile_groups)).reshape(M, N)
