"""Mosaic TPU: the exact contract, 128 products at a time. For results, not for speed.

On a 256-wide matrix unit a product over 128 fills half of it, and every partial sum costs the
vector unit a multiplication and an addition: BF16 is faster wherever FP8 is not native.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.chip import needs_tpu
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.select import Unsupported

TILE = 256


def _kernel(groups_ref, x_ref, x_scales_ref, w_ref, w_scales_ref, y_ref, sums_ref, *, size: int):
    step, steps = pl.program_id(2), pl.num_programs(2)
    in_a_group = groups_ref[pl.program_id(0)] >= 0

    @pl.when(step == 0)
    def _begin():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(in_a_group)
    def _add():
        blocks = x_ref.shape[1] // BLOCK
        for number in range(blocks):
            here = slice(number * BLOCK, (number + 1) * BLOCK)
            block = step * blocks + number
            # BF16 holds every number of e4m3, and all TPUs multiply it.
            x, w = x_ref[:, here].astype(jnp.bfloat16), w_ref[:, here].astype(jnp.bfloat16)
            if size % BLOCK:
                x, w = (_cut(values, size - block * BLOCK) for values in (x, w))
            part = lax.dot_general(
                x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            scales = x_scales_ref[...]
            is_this = lax.broadcasted_iota(jnp.int32, scales.shape, 1) == block
            x_scale = jnp.where(is_this, scales, 0).sum(1, keepdims=True)
            sums_ref[...] += part * (x_scale * w_scales_ref[number])

    @pl.when(step == steps - 1)
    def _end():
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def _cut(values: Array, size: Array) -> Array:
    """Zeros from column `size` on: what lies past the edge of the matrix is anything."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, values.shape, 1) < size, values, 0)


def _call(op: str, x_MK: Array, x_scales: Array, w_GNK, w_scales, groups, rows: int, out_dtype):
    """`groups` has the matrix of each tile of `rows` rows; w_scales [G, N, ceil(K/128)]."""
    needs_tpu(op)
    (M, K), N, across = x_MK.shape, w_GNK.shape[1], w_scales.shape[2]
    if not (M and K and N):
        raise Unsupported(f"{op}/tpu wants numbers, got x {x_MK.shape}, w {w_GNK.shape}")
    blocks = next(n for n in (4, 2, 1) if across % n == 0)
    columns, depth = min(N, TILE), blocks * BLOCK
    none = pl.squeezed
    return pl.pallas_call(
        functools.partial(_kernel, size=K),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_blocks(M, rows), num_blocks(N, columns), across // blocks),
            in_specs=[
                pl.BlockSpec((rows, depth), lambda m, n, k, g: (m, k)),
                pl.BlockSpec((rows, across), lambda m, n, k, g: (m, 0)),
                pl.BlockSpec((none, columns, depth), lambda m, n, k, g: (_at(g, m), n, k)),
                pl.BlockSpec((none, blocks, 1, columns), lambda m, n, k, g: (_at(g, m), k, 0, n)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda m, n, k, g: (m, n)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (M, N), out_dtype, manual_axis_type=jax.typeof(x_MK).manual_axis_type
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            transcendentals=0,
            bytes_accessed=M * K + w_GNK.size + M * N * jnp.dtype(out_dtype).itemsize,
        ),
        name=op,
    )(groups, x_MK, x_scales, w_GNK, w_scales.swapaxes(1, 2)[:, :, None])


def _at(groups_ref, tile):
    return jnp.maximum(groups_ref[tile], 0)


def matmul(
    x_MK: Array, x_scales: Array, w_NK: Array, w_scales: Array, *, out_dtype: DTypeLike
) -> Array:
    """See `fp8_matmul`."""
    M, N = x_MK.shape[0], w_NK.shape[0]
    if w_scales.shape[0] != N:
        w_scales = jnp.repeat(w_scales, BLOCK, axis=0)[:N]
    rows = max(min(M, TILE), 1)
    groups = jnp.zeros(num_blocks(M, rows), jnp.int32)
    return _call(
        *("fp8_matmul", x_MK, x_scales, w_NK[None], w_scales[None], groups, rows, out_dtype)
    )


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
    w_scales = jnp.repeat(w_scales, BLOCK, axis=1)[:, : w_GNK.shape[1]]
    return _call(
        *("fp8_grouped_matmul", x_MK, x_scales, w_GNK, w_scales, tile_groups, BLOCK, out_dtype)
    )
