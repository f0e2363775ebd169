"""Grouped matrix product of block FP8: rows sorted by group, each group's rows by whole tiles."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import select
from pallas_kernels.fp8_grouped_matmul import reference
from pallas_kernels.fp8_matmul import gpu, tpu
from pallas_kernels.quantize.shapes import BLOCK, num_blocks

IMPLEMENTATIONS = {
    "gpu": gpu.grouped_matmul,
    "tpu": tpu.grouped_matmul,
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
    (M, K), (G, N, inner) = x_MK.shape, w_GNK.shape
    fits = x_scales.shape == (M, num_blocks(K)) and inner == K and M % BLOCK == 0
    fits &= w_scales.shape == (G, num_blocks(N), num_blocks(K))
    if not fits or tile_groups.shape != (M // BLOCK,):
        raise ValueError(
            "fp8_grouped_matmul wants x [M, K] with M a multiple of 128, scales [M, ceil(K/128)], "
            "w [G, N, K], scales [G, ceil(N/128), ceil(K/128)] and groups [M/128]; got "
            f"{x_MK.shape}, {x_scales.shape}, {w_GNK.shape}, {w_scales.shape}, {tile_groups.shape}"
        )
    if {x_MK.dtype, w_GNK.dtype} != {jnp.dtype(jnp.float8_e4m3fn)}:
        raise ValueError(
            f"fp8_grouped_matmul wants float8_e4m3fn, got {x_MK.dtype} and {w_GNK.dtype}"
        )
    return select.run(
        "fp8_grouped_matmul",
        IMPLEMENTATIONS,
        implementation,
        *(x_MK, x_scales, w_GNK, w_scales, tile_groups),
        out_dtype=out_dtype,
    )
