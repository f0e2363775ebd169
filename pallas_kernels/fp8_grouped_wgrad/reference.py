"""The definition: one tile of 128 rows at a time, its sum scaled and added in FP32."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.quantize.shapes import BLOCK
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
    """See `fp8_grouped_wgrad`."""
    # BF16 holds every number of e4m3, so its products are exact on all platforms.
    operands = (
        *(_tiles(dy_NM).astype(jnp.bfloat16), dy_scales.T),
        *(_tiles(x_KM).astype(jnp.bfloat16), x_scales.T),
    )
    *operands, tile_groups = alike(*operands, tile_groups)

    def add(dw_GNK, tile):
        dy_NB, dy_scale_N, x_KB, x_scale_K, group = tile
        part_NK = lax.dot_general(
            dy_NB, x_KB, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        part_NK *= dy_scale_N[:, None] * x_scale_K[None]
        at = jnp.maximum(group, 0)
        return dw_GNK.at[at].add(jnp.where(group >= 0, part_NK, 0)), None

    shape = num_groups, dy_NM.shape[0], x_KM.shape[0]
    zeros = jnp.zeros_like(operands[1], shape=shape)
    dw_GNK, _ = lax.scan(add, zeros, (*operands, tile_groups))
    return dw_GNK.astype(out_dtype)


def _tiles(values: Array) -> Array:
    """[rows, M] as [M/128, rows, 128]."""
    return values.reshape(values.shape[0], -1, BLOCK).swapaxes(0, 1)
