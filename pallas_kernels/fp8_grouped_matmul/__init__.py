"""Grouped matrix product of block FP8: each row by the matrix of its group.

`fp8_sorted_matmul` takes rows as they come from sorting, `fp8_grouped_matmul` rows in whole tiles.
"""

import functools

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import operands, select
from pallas_kernels.fp8_grouped_matmul import dequantize, reference
from pallas_kernels.fp8_matmul import gpu, tpu
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.tiles import tiles

IMPLEMENTATIONS = {
    "gpu": gpu.grouped_matmul,
    "tpu": tpu.grouped_matmul,
    "dequantize_bf16": dequantize.grouped_matmul_bf16,
    "dequantize": dequantize.grouped_matmul,
    "reference": reference.grouped_matmul,
}


def fp8_grouped_matmul(
    x_MK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    tile_groups: Array,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Array:
    """y[m] = x[m] w[g]^T where g is the group of the tile of 128 rows that m lies in.

    DeepGEMM's contiguous layout: the rows of a group begin at a multiple of 128 and are filled up
    to one, best with zeros. `x_MK` [M, K] e4m3 with scales [M, ceil(K/128)] as from
    `quantize_rows`; `w_GNK` [G, N, K] with scales [G, ceil(N/128), ceil(K/128)] as from
    `quantize_blocks`; `tile_groups` [M/128] int32, negative for tiles of no group, which give
    zeros. The arithmetic is that of `fp8_matmul`. With w and its scales turned (N and K swapped) it
    is the gradient of x.
    """
    operands.check(
        "fp8_grouped_matmul",
        out_dtype=out_dtype,
        x=(x_MK, 2, operands.E4M3),
        x_scales=(x_scales, 2, operands.SCALES),
        w=(w_GNK, 3, operands.E4M3),
        w_scales=(w_scales, 3, operands.SCALES),
        tile_groups=(tile_groups, 1, operands.COUNTS),
    )
    M = x_MK.shape[0]
    fits = M % BLOCK == 0 and tile_groups.shape == (M // BLOCK,)
    if not fits or not _fit(x_MK, x_scales, w_GNK, w_scales):
        raise ValueError(
            "fp8_grouped_matmul wants x [M, K] with M a multiple of 128, scales [M, ceil(K/128)], "
            "w [G, N, K], scales [G, ceil(N/128), ceil(K/128)] and groups [M/128]; got "
            f"{x_MK.shape}, {x_scales.shape}, {w_GNK.shape}, {w_scales.shape}, {tile_groups.shape}"
        )
    return select.run(
        "fp8_grouped_matmul",
        IMPLEMENTATIONS,
        implementation,
        *(x_MK, x_scales, w_GNK, w_scales, tile_groups),
        out_dtype=out_dtype,
    )


def _in_tiles(grouped_matmul, x_MK, x_scales, w_GNK, w_scales, sizes_G, *, out_dtype):
    layout = tiles(sizes_G, x_MK.shape[0])
    operands = layout.into(x_MK), layout.into(x_scales), w_GNK, w_scales, layout.group_T
    return layout.back(grouped_matmul(*operands, out_dtype=out_dtype))


SORTED = {
    name: functools.partial(_in_tiles, grouped) for name, grouped in IMPLEMENTATIONS.items()
} | {
    "dequantize_bf16": dequantize.sorted_matmul_bf16,
    "dequantize": dequantize.sorted_matmul,
}


def fp8_sorted_matmul(
    x_MK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    sizes_G: Array,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Array:
    """`fp8_grouped_matmul` of rows sorted by group, as `grouped_matmul` takes them.

    `sizes_G` [G] int32 with sum at most M; rows behind the last group give zeros. Any M.
    """
    operands.check(
        "fp8_sorted_matmul",
        out_dtype=out_dtype,
        x=(x_MK, 2, operands.E4M3),
        x_scales=(x_scales, 2, operands.SCALES),
        w=(w_GNK, 3, operands.E4M3),
        w_scales=(w_scales, 3, operands.SCALES),
        sizes=(sizes_G, 1, operands.COUNTS),
    )
    fits = _fit(x_MK, x_scales, w_GNK, w_scales)
    if not fits or sizes_G.shape != w_GNK.shape[:1]:
        raise ValueError(
            "fp8_sorted_matmul wants x [M, K], scales [M, ceil(K/128)], w [G, N, K], scales "
            f"[G, ceil(N/128), ceil(K/128)] and sizes [G]; got {x_MK.shape}, {x_scales.shape}, "
            f"{w_GNK.shape}, {w_scales.shape}, {sizes_G.shape}"
        )
    return select.run(
        "fp8_sorted_matmul",
        SORTED,
        implementation,
        *(x_MK, x_scales, w_GNK, w_scales, sizes_G),
        out_dtype=out_dtype,
    )


def _fit(x_MK: Array, x_scales: Array, w_GNK: Array, w_scales: Array) -> bool:
    (M, K), (G, N, inner) = x_MK.shape, w_GNK.shape
    shapes = (M, num_blocks(K)), (G, num_blocks(N), num_blocks(K))
    return inner == K and (x_scales.shape, w_scales.shape) == shapes
