"""Mosaic TPU v7x: four blocks of 128 brought to one scale, then 512 products at a time.

    y[m, n] = sum_c xs'[m, c] ws'[n, c] (sum_{k in the 512 of c} x'[m, k] w'[n, k])
    xs' = the largest xs of the four blocks      x' = x xs / xs', rounded to e4m3 again

NOT THE SAME NUMBERS as the other implementations, and so never the default: it runs where it is
named. Only where scales are powers of two, and those of the four lie so near one another that no
value falls below e4m3's smallest step, is the second rounding exact. In exchange the matrix unit
takes FP8 as it is and all of its width, and the vector unit has a quarter of the sums to scale.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.chip import needs_fp8_tpu
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.select import Unsupported

TOGETHER = 4
WIDE = TOGETHER * BLOCK
TILE = 512


def _column(values: Array, number: Array) -> Array:
    is_this = lax.broadcasted_iota(jnp.int32, values.shape, 1) == number
    return jnp.where(is_this, values, 0).sum(1, keepdims=True)


def _widen(values_ref, ratios_ref, wide_ref, *, size: int):
    """`ratios_ref` [rows, K'/128] holds what each block of 128 is multiplied by."""
    first = pl.program_id(1) * TOGETHER
    for number in range(TOGETHER):
        here = slice(number * BLOCK, (number + 1) * BLOCK)
        values = values_ref[:, here].astype(jnp.float32)
        column = (first + number) * BLOCK + lax.broadcasted_iota(jnp.int32, values.shape, 1)
        # What lies past the edge of the matrix is anything.
        values = jnp.where(column < size, values * _column(ratios_ref[...], first + number), 0)
        wide_ref[:, here] = values.astype(jnp.float8_e4m3fn)


def _widened(values: Array, scales: Array) -> tuple[Array, Array]:
    """Values [rows, K'] e4m3 with one scale to 512 of them [rows, K'/512]; K' is K filled up.

    Of `values` [rows, K] with one scale to 128 of them.
    """
    num_rows, across = scales.shape
    wide, rows = num_blocks(across, TOGETHER), min(num_rows, TILE)
    scales = jnp.pad(scales, ((0, 0), (0, wide * TOGETHER - across)))
    scales = scales.reshape(num_rows, wide, TOGETHER)
    largest = scales.max(2, keepdims=True)
    ratios = (scales / largest).reshape(num_rows, -1)
    out = pl.pallas_call(
        functools.partial(_widen, size=values.shape[1]),
        grid=(num_blocks(num_rows, rows), wide),
        in_specs=[
            pl.BlockSpec((rows, WIDE), lambda m, k: (m, k)),
            pl.BlockSpec((rows, wide * TOGETHER), lambda m, k: (m, 0)),
        ],
        out_specs=pl.BlockSpec((rows, WIDE), lambda m, k: (m, k)),
        out_shape=jax.ShapeDtypeStruct(
            (num_rows, wide * WIDE),
            values.dtype,
            manual_axis_type=jax.typeof(values).manual_axis_type,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="fp8_widen",
    )(values, ratios)
    return out, largest[..., 0]


def _kernel(x_ref, x_scales_ref, w_ref, w_scales_ref, y_ref, sums_ref):
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _begin():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    part = lax.dot_general(
        x_ref[...], w_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    sums_ref[...] += part * (_column(x_scales_ref[...], step) * w_scales_ref[...])

    @pl.when(step == steps - 1)
    def _end():
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def matmul(
    x_MK: Array, x_scales: Array, w_NK: Array, w_scales: Array, *, out_dtype: DTypeLike
) -> Array:
    """See `fp8_matmul` for what it stands for, and above for what is computed."""
    op = "fp8_matmul"
    needs_fp8_tpu(op)
    (M, K), N = x_MK.shape, w_NK.shape[0]
    if not (M and N and K):
        raise Unsupported(f"{op}/tpu_wide wants numbers, got x {x_MK.shape}, w {w_NK.shape}")
    if w_scales.shape[0] != N:
        w_scales = jnp.repeat(w_scales, BLOCK, axis=0)[:N]
    x_MK, x_scales = _widened(x_MK, x_scales)
    w_NK, w_scales = _widened(w_NK, w_scales)
    across, rows, columns = x_scales.shape[1], min(M, TILE), min(N, TILE)
    return pl.pallas_call(
        _kernel,
        grid=(num_blocks(M, rows), num_blocks(N, columns), across),
        in_specs=[
            pl.BlockSpec((rows, WIDE), lambda m, n, k: (m, k)),
            pl.BlockSpec((rows, across), lambda m, n, k: (m, 0)),
            pl.BlockSpec((columns, WIDE), lambda m, n, k: (n, k)),
            pl.BlockSpec((pl.squeezed, 1, columns), lambda m, n, k: (k, 0, n)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct(
            (M, N), out_dtype, manual_axis_type=jax.typeof(x_MK).manual_axis_type
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            transcendentals=0,
            bytes_accessed=M * K + N * K + M * N * jnp.dtype(out_dtype).itemsize,
        ),
        name=f"{op}_wide",
    )(x_MK, x_scales, w_NK, w_scales.T[:, None])
