"""Grouped matrix product of block FP8 where every group has the same number of places for rows."""

import functools

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import fp8_grouped_matmul, select
from pallas_kernels.fp8_masked_matmul import dequantize
from pallas_kernels.quantize import e4m3
from pallas_kernels.quantize.shapes import BLOCK, num_blocks


def _in_tiles(grouped_matmul, x_GMK, x_scales, w_GNK, w_scales, sizes_G, *, out_dtype) -> Array:
    """By a product of whole tiles of 128 rows, for each of which a group has room."""
    G, M, _ = x_GMK.shape
    tiles = num_blocks(M)
    x_MK, x_scales = (
        jnp.pad(one, ((0, 0), (0, tiles * BLOCK - M), (0, 0))).reshape(-1, one.shape[2])
        for one in (x_GMK, x_scales)
    )
    group_G, first_T = (jnp.arange(n, dtype=jnp.int32) for n in (G, tiles))
    is_used_GT = first_T[None] * BLOCK < sizes_G[:, None]
    tile_groups = jnp.where(is_used_GT, group_G[:, None], -1).reshape(-1)
    y_MN = grouped_matmul(x_MK, x_scales, w_GNK, w_scales, tile_groups, out_dtype=out_dtype)
    return dequantize.masked(y_MN.reshape(G, tiles * BLOCK, -1)[:, :M], sizes_G)


IMPLEMENTATIONS = {
    name: functools.partial(_in_tiles, grouped)
    for name, grouped in fp8_grouped_matmul.IMPLEMENTATIONS.items()
} | {"dequantize": dequantize.matmul}


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
    e4m3.check("fp8_masked_matmul", x_GMK, w_GNK)
    return select.run(
        "fp8_masked_matmul",
        IMPLEMENTATIONS,
        implementation,
        *(x_GMK, x_scales, w_GNK, w_scales, sizes_G),
        out_dtype=out_dtype,
    )
