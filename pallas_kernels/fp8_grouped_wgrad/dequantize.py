"""Values times scales, then ordinary products, as `fp8_matmul/dequantize.py` has it."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.fp8_matmul.dequantize import product
from pallas_kernels.grouped_matmul import grouped_wgrad
from pallas_kernels.quantize import dequantize_rows
from pallas_kernels.quantize.shapes import BLOCK
from pallas_kernels.tiles import counts
from pallas_kernels.varying import alike


def wgrad(
    dy_NM: Array,
    dy_scales: Array,
    x_KM: Array,
    x_scales: Array,
    tile_groups: Array,
    *,
    num_groups: int,
    out_dtype: DTypeLike,
) -> Array:
    """See `fp8_grouped_wgrad`. One tile at a time; those of no group cost nothing."""
    dy_NM, x_KM, tile_groups = alike(
        dequantize_rows(dy_NM, dy_scales), dequantize_rows(x_KM, x_scales), tile_groups
    )

    def add(tile, dw_GNK):
        group, start = tile_groups[tile], tile * BLOCK
        dy_NB, x_KB = (lax.dynamic_slice_in_dim(one, start, BLOCK, 1) for one in (dy_NM, x_KM))
        sum_NK = dw_GNK[group] + product(dy_NB, x_KB)
        return lax.dynamic_update_index_in_dim(dw_GNK, sum_NK, group, 0)

    zeros = jnp.zeros_like(dy_NM, shape=(num_groups, dy_NM.shape[0], x_KM.shape[0]))
    if not tile_groups.size:
        return zeros.astype(out_dtype)
    used = (tile_groups >= 0).sum(dtype=jnp.int32)
    return lax.fori_loop(0, used, add, zeros).astype(out_dtype)


def wgrad_bf16(
    dy_NM: Array,
    dy_scales: Array,
    x_KM: Array,
    x_scales: Array,
    tile_groups: Array,
    *,
    num_groups: int,
    out_dtype: DTypeLike,
) -> Array:
    """See `fp8_grouped_wgrad`. What lies in tiles by group is sorted by group: `grouped_wgrad`."""
    dy_NM, x_KM, tile_groups = alike(
        dequantize_rows(dy_NM, dy_scales, jnp.bfloat16),
        dequantize_rows(x_KM, x_scales, jnp.bfloat16),
        tile_groups,
    )
    sizes_G = BLOCK * counts(tile_groups, num_groups)
    return grouped_wgrad(dy_NM.T, x_KM.T, sizes_G, out_dtype=out_dtype)
