"""Mosaic GPU, for Hopper: persistent, one warpgroup that fetches and two that multiply.

Each of the two owns 64 rows of a tile of 128x128. Tensor cores add up 128 products in an
accumulator of their own, of some 14 bits; then FP32 arithmetic scales the sum and adds it to the
running one. While one warpgroup does that, the tensor cores work for the other. The copy engine
fills what lies past an edge with zeros and writes nothing there.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.chip import needs_hopper, num_programs
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.select import Unsupported
from pallas_kernels.varying import like

WGMMA = plgpu.Layout.WGMMA
COMPUTE_GROUPS = 2
ROWS = BLOCK // COMPUTE_GROUPS
# Stages of 33 KiB, and the tile on its way out, in the 227 KiB of a program.
STAGES = 5
# Tiles of neighbouring programs lie in bands this many wide, so that they share rows and columns in
# the second-level cache.
BAND = 8


def tiled(dtype, width: int):
    """How tiles `width` wide lie in shared memory."""
    swizzle = width * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)


def in_bands(number, down: int, across: int):
    """(row, column) of a tile by its number: bands BAND rows high, to and fro.

    As `plgpu.planar_snake`, but by constants alone. It divides by the height of the last band where
    that is lower, which is a call of a function, and where there is one, ptxas lets each of the
    tensor cores' instructions wait for the one before (C7509, C7519).
    """
    band, rest = lax.div(number, BAND * across), lax.rem(number, BAND * across)
    row, column = band * BAND + lax.rem(rest, BAND), lax.div(rest, BAND)
    if lower := down % BAND:
        # Not `rest`, though it is the same: two remainders of it would become one, by a variable.
        last = number - (down - lower) * across
        row = jnp.where(last >= 0, down - lower + lax.rem(last, lower), row)
        column = jnp.where(last >= 0, lax.div(last, lower), column)
    return row, jnp.where(lax.rem(band, 2) == 1, across - 1 - column, column)


def add_products(sums: Array, x_smem, w_smem, x_scales_smem, w_scales) -> Array:
    """sums + x w^T over 128, scaled: a row of scales for each operand, or a function for one."""

    def products(part_ref):
        plgpu.wgmma(part_ref, x_smem, w_smem.T)
        # The tensor cores are at work. Scales are read by ordinary loads, and what the copy engine
        # puts in their place must not overtake those: hence the fence.
        scale = plgpu.load(x_scales_smem, layout=WGMMA.reduce(1))
        if callable(w_scales):
            scale *= w_scales()
        plgpu.commit_smem()
        return part_ref[...], scale

    part, scale = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32))
    part *= lax.broadcast_in_dim(scale, part.shape, (0,))
    if not callable(w_scales):
        # Not before: 32 numbers more to a thread would not fit its registers.
        scale = plgpu.load(w_scales.at[0], layout=WGMMA.reduce(0))
        part *= lax.broadcast_in_dim(scale, part.shape, (1,))
        plgpu.commit_smem()
    return sums + part


def _kernel(
    x_gmem, x_scales_gmem, w_gmem, w_scales_gmem, *rest, by_column: bool, stages: int
) -> None:
    """`rest` is, for rows in groups, the group of each tile of 128 rows; and the result."""
    *groups_gmem, y_gmem = rest
    (M, N), K = y_gmem.shape, x_gmem.shape[1]
    down, across, steps = num_blocks(M), num_blocks(N), num_blocks(K)
    warpgroup = lax.axis_index("warpgroup")
    mine = pl.ds(warpgroup * ROWS, ROWS)
    operand = {
        "transforms": tiled(x_gmem.dtype, 64 if K % BLOCK else BLOCK),
        "memory_space": plgpu.SMEM,
    }
    line = plgpu.BlockSpec((1, BLOCK), lambda k: (k, 0), memory_space=plgpu.SMEM)
    tile = plgpu.BlockSpec((BLOCK, BLOCK), lambda k: (0, k), **operand)

    def pipeline(body, context, steps_here=steps):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps_here,),
            in_specs=[tile, tile, line, *[line] * by_column],
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=COMPUTE_GROUPS,
            max_concurrent_steps=min(stages, steps),
            compute_context=context,
        )

    def nothing(*_, **__):
        pass

    allocations = pipeline(nothing, nothing).get_allocations(
        x_gmem, w_gmem, x_scales_gmem, *[w_scales_gmem] * by_column
    )

    @functools.partial(
        pl.run_scoped,
        allocations=allocations,
        y_smem=plgpu.SMEM(
            (COMPUTE_GROUPS, ROWS, BLOCK),
            y_gmem.dtype,
            transforms=tiled(y_gmem.dtype, 128 // jnp.dtype(y_gmem.dtype).itemsize),
        ),
        collective_axes="warpgroup",
    )
    def _shared(allocations, y_smem):
        @plgpu.nd_loop((down * across,), collective_axes="program")
        def _tiles(loop):
            m, n = in_bands(loop.index[0], down, across)
            rows, columns = pl.ds(m * BLOCK, BLOCK), pl.ds(n * BLOCK, BLOCK)
            # The matrices of all groups lie below one another. What a tile at the right edge reads
            # of the next one's is not written.
            group, steps_here = 0, steps
            if groups_gmem:
                group = jnp.maximum(groups_gmem[0][m], 0)
                steps_here = jnp.where(groups_gmem[0][m] >= 0, steps, 0)
            w_rows, w_block = pl.ds(group * N + n * BLOCK, BLOCK), group * across + n

            def context(run):
                sums = run(plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), WGMMA))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                y_smem[warpgroup] = sums.astype(y_gmem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_smem.at[warpgroup], y_gmem.at[rows, columns].at[mine])

            def body(index, x_smem, w_smem, x_scales_smem, *rest):
                *w_scales, sums = rest
                if not by_column:
                    w_scales = [lambda: w_scales_gmem[w_block, index[0]]]
                x_scales = x_scales_smem.at[0, mine]
                return add_products(sums, x_smem.at[mine], w_smem, x_scales, *w_scales)

            pipeline(body, context, steps_here)(
                x_gmem.at[rows],
                w_gmem.at[w_rows],
                x_scales_gmem.at[:, rows],
                *[w_scales_gmem.at[:, w_rows]] * by_column,
                allocations=allocations,
            )

        plgpu.wait_smem_to_gmem(0)


def _call(op: str, x_MK: Array, x_scales: Array, w, w_scales: Array, groups, N: int, out_dtype):
    needs_hopper(op)
    (M, K), itemsize = x_MK.shape, jnp.dtype(out_dtype).itemsize
    if not M or not N or not K or K % 64 or N % (128 // itemsize):
        raise Unsupported(
            f"{op}/gpu wants K by 64 and N by {128 // itemsize} for {jnp.dtype(out_dtype)}, "
            f"got x {x_MK.shape}, N={N}"
        )
    # The copy engine takes rows by eight. Few tokens may be any number.
    more = -M % 8
    by_column = not groups and w_scales.shape[0] == N
    kernel = plgpu.kernel(
        functools.partial(_kernel, by_column=by_column, stages=STAGES - (itemsize == 4)),
        out_type=jax.ShapeDtypeStruct((M + more, N), out_dtype),
        grid=(num_programs(),),
        grid_names=("program",),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="warpgroup",
    )
    y_MN = kernel(
        jnp.pad(x_MK, ((0, more), (0, 0))),
        jnp.pad(x_scales.T, ((0, 0), (0, more))),
        w.reshape(-1, K),
        w_scales.T if by_column else w_scales.reshape(-1, w_scales.shape[-1]),
        *groups,
    )
    return like(x_MK, y_MN[:M])


def matmul(
    x_MK: Array, x_scales: Array, w_NK: Array, w_scales: Array, *, out_dtype: DTypeLike
) -> Array:
    """See `fp8_matmul`."""
    N = w_NK.shape[0]
    return _call("fp8_matmul", x_MK, x_scales, w_NK, w_scales, [], N, out_dtype)


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
    op, N = "fp8_grouped_matmul", w_GNK.shape[1]
    return _call(op, x_MK, x_scales, w_GNK, w_scales, [tile_groups], N, out_dtype)
