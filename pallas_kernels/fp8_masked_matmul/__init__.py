"""Grouped matrix product of block FP8 where every group has the same number of places for rows."""

import functools

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import fp8_grouped_matmul, operands, select
from pallas_kernels.fp8_masked_matmul import dequantize
from pallas_kernels.quantize.shapes import num_blocks
from pallas_kernels.tiles import places


def _in_tiles(grouped_matmul, x_GMK, x_scales, w_GNK, w_scales, sizes_G, *, out_dtype) -> Array:
    """By a product of whole tiles of 128 rows, for each of which a group has room."""
    layout = places(sizes_G, x_GMK.shape[1])
    operands = layout.into(x_GMK), layout.into(x_scales), w_GNK, w_scales, layout.group_T
    return layout.back(grouped_matmul(*operands, out_dtype=out_dtype))


IMPLEMENTATIONS = {
    name: functools.partial(_in_tiles, grouped)
    for name, grouped in fp8_grouped_matmul.IMPLEMENTATIONS.items()
} | {"dequantize_bf16": dequantize.matmul_bf16, "dequantize": dequantize.matmul}


def fp8_masked_matmul(
    x_GMK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    sizes_G: Array,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Array:
    """y[g, m] = x[g, m] w[g]^T in the first `sizes_G[g]` places m of each group, zeros behind them.

    DeepGEMM's masked layout, for generating: where tokens go is known on the device alone, and
    shapes have room for the most. `x_GMK` [G, M, K] e4m3 with scales [G, M, ceil(K/128)] as from
    `quantize_rows`; `w_GNK` [G, N, K] with scales [G, ceil(N/128), ceil(K/128)] as from
    `quantize_blocks`; `sizes_G` [G] int32. The arithmetic is that of `fp8_matmul`; what lies in
    places not used is not looked at.
    """
    operands.check(
        "fp8_masked_matmul",
        out_dtype=out_dtype,
        x=(x_GMK, 3, operands.E4M3),
        x_scales=(x_scales, 3, operands.SCALES),
        w=(w_GNK, 3, operands.E4M3),
        w_scales=(w_scales, 3, operands.SCALES),
        sizes=(sizes_G, 1, operands.COUNTS),
    )
    (G, M, K), N = x_GMK.shape, w_GNK.shape[1]
    across = num_blocks(K)
    fits = w_GNK.shape == (G, N, K) and sizes_G.shape == (G,)
    shapes = (G, M, across), (G, num_blocks(N), across)
    if not fits or (x_scales.shape, w_scales.shape) != shapes:
        raise ValueError(
            "fp8_masked_matmul wants x [G, M, K], scales [G, M, ceil(K/128)], w [G, N, K], scales "
            f"[G, ceil(N/128), ceil(K/128)] and sizes [G]; got {x_GMK.shape}, {x_scales.shape}, "
            f"{w_GNK.shape}, {w_scales.shape}, {sizes_G.shape}"
        )
    return select.run(
        "fp8_masked_matmul",
        IMPLEMENTATIONS,
        implementation,
        *(x_GMK, x_scales, w_GNK, w_scales, sizes_G),
        out_dtype=out_dtype,
    )
