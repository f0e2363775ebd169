"""Gradient of grouped matrices in block FP8: a sum over each group's rows, by whole tiles."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import operands, select
from pallas_kernels.fp8_grouped_wgrad import dequantize, gpu, reference, tpu
from pallas_kernels.quantize.shapes import BLOCK

IMPLEMENTATIONS = {
    "gpu": gpu.wgrad,
    "tpu": tpu.wgrad,
    "dequantize_bf16": dequantize.wgrad_bf16,
    "dequantize": dequantize.wgrad,
    "reference": reference.wgrad,
}


def fp8_grouped_wgrad(
    dy_NM: Array,
    dy_scales: Array,
    x_KM: Array,
    x_scales: Array,
    tile_groups: Array,
    num_groups: int,
    *,
    out_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """dw [G, N, K]: of each group the sum over its tiles, in FP32, rounded to `out_dtype` once.

        dw[g, n, k] = sum_{t of g} dys[n, t] xs[k, t] (sum_{m in tile t} dy[n, m] x[k, m])

    Both operands lie transposed in e4m3, as `quantize_columns` gives them for rows in the layout of
    `fp8_grouped_matmul`: `dy_NM` [N, M] and `x_KM` [K, M] with scales [N, M/128] and [K, M/128].
    `tile_groups` [M/128] int32 ascends from 0 to G - 1 where it is not negative; negative are tiles
    of no group, which come last and add nothing. A group without tiles gets zeros.
    """
    operands.check(
        "fp8_grouped_wgrad",
        out_dtype=out_dtype,
        dy=(dy_NM, 2, operands.E4M3),
        dy_scales=(dy_scales, 2, operands.SCALES),
        x=(x_KM, 2, operands.E4M3),
        x_scales=(x_scales, 2, operands.SCALES),
        tile_groups=(tile_groups, 1, operands.COUNTS),
    )
    (N, M), K = dy_NM.shape, x_KM.shape[0]
    tiles = M // BLOCK
    fits = M % BLOCK == 0 and x_KM.shape == (K, M) and tile_groups.shape == (tiles,)
    if not fits or (dy_scales.shape, x_scales.shape) != ((N, tiles), (K, tiles)):
        raise ValueError(
            "fp8_grouped_wgrad wants dy [N, M] with M a multiple of 128, scales [N, M/128], "
            f"x [K, M], scales [K, M/128] and groups [M/128]; got {dy_NM.shape}, "
            f"{dy_scales.shape}, {x_KM.shape}, {x_scales.shape}, {tile_groups.shape}"
        )
    return select.run(
        "fp8_grouped_wgrad",
        IMPLEMENTATIONS,
        implementation,
        *(dy_NM, dy_scales, x_KM, x_scales, tile_groups),
        num_groups=num_groups,
        out_dtype=out_dtype,
    )
