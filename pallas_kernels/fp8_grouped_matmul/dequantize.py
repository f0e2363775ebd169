"""Values times scales, then ordinary products, as `fp8_matmul/dequantize.py` has it."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.fp8_matmul.dequantize import product
from pallas_kernels.grouped_matmul.blocks import rows_times_matrix
from pallas_kernels.grouped_matmul.ragged import ragged_rows_times_matrix
from pallas_kernels.quantize import dequantize_blocks, dequantize_rows
from pallas_kernels.quantize.shapes import BLOCK
from pallas_kernels.varying import alike


def grouped_matmul(
    x_MK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    tile_groups: Array,
    *,
    out_dtype: DTypeLike,
    factors: DTypeLike = jnp.float32,
) -> Array:
    """See `fp8_grouped_matmul`. One tile at a time; those of no group cost nothing."""
    (M, K), N = x_MK.shape, w_GNK.shape[1]
    x_MK, x_scales, w_GNK, w_scales, tile_groups = alike(
        x_MK, x_scales, w_GNK, w_scales, tile_groups
    )

    def multiply(x, scales, group):
        w_NK = dequantize_blocks(w_GNK[group], w_scales[group], factors)
        return product(dequantize_rows(x, scales, factors), w_NK).astype(out_dtype)

    def nothing(x, *_):
        return jnp.zeros_like(x, shape=(BLOCK, N), dtype=out_dtype)

    def tile(operands):
        *_, group = operands
        return lax.cond(group >= 0, multiply, nothing, *operands)

    tiles = M // BLOCK
    x, scales = x_MK.reshape(tiles, BLOCK, K), x_scales.reshape(tiles, BLOCK, x_scales.shape[1])
    return lax.map(tile, (x, scales, tile_groups)).reshape(M, N)


grouped_matmul_bf16 = functools.partial(grouped_matmul, factors=jnp.bfloat16)


def sorted_matmul(
    x_MK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    sizes_G: Array,
    *,
    out_dtype: DTypeLike,
) -> Array:
    """See `fp8_sorted_matmul`. Rows stay where they are: no tile has to be filled up."""
    x_MK, w_GNK, sizes_G = alike(
        dequantize_rows(x_MK, x_scales), dequantize_matrices(w_GNK, w_scales), sizes_G
    )
    # As in `product`: FP32 also on platforms that would round the factors by default.
    with jax.default_matmul_precision("highest"):
        return rows_times_matrix(x_MK, w_GNK, sizes_G, contract=1, out_dtype=out_dtype)


def sorted_matmul_bf16(
    x_MK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    sizes_G: Array,
    *,
    out_dtype: DTypeLike,
) -> Array:
    """See `fp8_sorted_matmul`. As `grouped_matmul` has it on each platform."""
    x_MK, w_GNK, sizes_G = alike(
        dequantize_rows(x_MK, x_scales, jnp.bfloat16),
        dequantize_matrices(w_GNK, w_scales, jnp.bfloat16),
        sizes_G,
    )
    on_tpu, elsewhere = (
        functools.partial(one, contract=1, out_dtype=out_dtype)
        for one in (ragged_rows_times_matrix, rows_times_matrix)
    )
    return lax.platform_dependent(x_MK, w_GNK, sizes_G, tpu=on_tpu, default=elsewhere)


def dequantize_matrices(values_GNK: Array, scales: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """`dequantize_blocks` of each group's matrix."""
    return jax.vmap(lambda *one: dequantize_blocks(*one, dtype))(values_GNK, scales)
