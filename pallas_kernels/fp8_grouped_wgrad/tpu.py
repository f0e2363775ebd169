"""Mosaic TPU: the exact contract, one tile of 128 rows to a step. For results, not for speed."""

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


def _kernel(groups_ref, _, dy_ref, dy_scales_ref, x_ref, x_scales_ref, *rest):
    """`rest` is the zeros that are written over, the result, and room for the sums."""
    _, dw_ref, sums_ref = rest
    tile, tiles = pl.program_id(2), pl.num_programs(2)
    group = groups_ref[tile]
    before = groups_ref[jnp.maximum(tile - 1, 0)]
    behind = groups_ref[jnp.minimum(tile + 1, tiles - 1)]

    @pl.when(tile == 0)
    def _none():
        # Where no group has a tile, this is written back nevertheless.
        dw_ref[...] = jnp.zeros_like(dw_ref)

    @pl.when((tile == 0) | (group != before))
    def _begin():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(group >= 0)
    def _add():
        # BF16 holds every number of e4m3, and all TPUs multiply it.
        dy, x = dy_ref[...].astype(jnp.bfloat16), x_ref[...].astype(jnp.bfloat16)
        part = lax.dot_general(dy, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        # A line of scales becomes a column by turning 128 of them.
        lines = jnp.broadcast_to(dy_scales_ref[...], (BLOCK, dy_scales_ref.shape[1]))
        sums_ref[...] += part * (lines.T[:, :1] * x_scales_ref[...])

    @pl.when((group >= 0) & ((tile == tiles - 1) | (group != behind)))
    def _end():
        dw_ref[...] = sums_ref[...].astype(dw_ref.dtype)


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
    op = "fp8_grouped_wgrad"
    needs_tpu(op)
    (N, M), K, none = dy_NM.shape, x_KM.shape[0], pl.squeezed
    if not (M and N and K):
        raise Unsupported(f"{op}/tpu wants numbers, got dy {dy_NM.shape}, x {x_KM.shape}")
    down, across = min(N, TILE), min(K, TILE)
    # The matrix that is being written at each tile: behind the last group, still that one's.
    written_T = jnp.maximum(lax.cummax(tile_groups), 0)
    # Matrices of groups without a tile are not written: they stay the zeros that all begin as. In
    # whole blocks, because the interpreter does not cut those short that are written over.
    whole = num_groups, num_blocks(N, down) * down, num_blocks(K, across) * across
    zeros = jnp.zeros_like(dy_scales, shape=whole, dtype=out_dtype)
    dw = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_blocks(N, down), num_blocks(K, across), M // BLOCK),
            in_specs=[
                pl.BlockSpec((down, BLOCK), lambda n, k, t, *_: (n, t)),
                pl.BlockSpec((none, 1, down), lambda n, k, t, *_: (t, 0, n)),
                pl.BlockSpec((across, BLOCK), lambda n, k, t, *_: (k, t)),
                pl.BlockSpec((none, 1, across), lambda n, k, t, *_: (t, 0, k)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(
                (none, down, across), lambda n, k, t, groups, written: (written[t], n, k)
            ),
            scratch_shapes=[pltpu.VMEM((down, across), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            whole, out_dtype, manual_axis_type=jax.typeof(zeros).manual_axis_type
        ),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            transcendentals=0,
            bytes_accessed=dy_NM.size
            + x_KM.size
            + num_groups * N * K * jnp.dtype(out_dtype).itemsize,
        ),
        name=op,
    )(tile_groups, written_T, dy_NM, dy_scales.T[:, None], x_KM, x_scales.T[:, None], zeros)
    return dw[:, :N, :K]
