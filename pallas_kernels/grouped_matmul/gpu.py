"""Mosaic GPU, for Hopper: persistent, one warpgroup that fetches and two that multiply BF16.

Each of the two owns 64 rows of a tile of the result and keeps their sums in its registers to the
end: tensor cores add products of BF16 in FP32, so that nothing is promoted on the way, as FP8 needs
it. They take 16-bit operands either way round, so that all three products of a layer read what is
there and nothing is turned in memory. Groups lie in whole tiles of 128 rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.chip import needs_hopper, num_programs
from pallas_kernels.fp8_matmul.gpu import COMPUTE_GROUPS, ROWS, in_bands, tiled
from pallas_kernels.grouped_matmul.gradients import differentiable
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.select import Unsupported
from pallas_kernels.tiles import tiles
from pallas_kernels.varying import like

# What is summed over in one step: 128 bytes, as wide as shared memory is swizzled.
DEPTH = 64
# Of the 227 KiB of a program 192 are for operands on their way in; 32 for results on their way out,
# two pieces of 64 rows by 128 bytes to a warpgroup.
OPERANDS = 192 * 1024
PIECES = 2


class _Tile(NamedTuple):
    """A tile of the result, and what it is the product of: `steps` blocks of 64 from `first` on."""

    a: Any
    b: Any
    first: Any
    steps: Any
    y: Any


def _block(size: int, down: bool, first) -> plgpu.BlockSpec:
    """One step's part of an operand; `down`: what is summed over is its first dimension."""
    return plgpu.BlockSpec(
        (DEPTH, size) if down else (size, DEPTH),
        lambda k: (first + k, 0) if down else (0, first + k),
        transforms=tiled(jnp.bfloat16, DEPTH),
        memory_space=plgpu.SMEM,
    )


def _multiply(
    grid: tuple[int, ...], tile: Callable[..., _Tile], y_gmem, a_gmem, b_gmem, *, down, steps: int
) -> None:
    """Each `tile(*index)` of `grid` in turn. `down` is that of both operands, see `_block`.

    No tile has more than `steps` steps.
    """
    a_down, b_down = down
    warpgroup = lax.axis_index("warpgroup")
    mine = pl.ds(warpgroup * ROWS, ROWS)
    columns, width = _columns(y_gmem.shape[-1]), 128 // jnp.dtype(y_gmem.dtype).itemsize

    def pipeline(body, context, first, steps_here):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps_here,),
            in_specs=[_block(BLOCK, a_down, first), _block(columns, b_down, first)],
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=COMPUTE_GROUPS,
            max_concurrent_steps=min(OPERANDS // (2 * DEPTH * (BLOCK + columns)), steps),
            compute_context=context,
        )

    def nothing(*_, **__):
        pass

    def body(_, a_smem, b_smem, sums_ref):
        a_smem = a_smem.at[:, mine].T if a_down else a_smem.at[mine]
        plgpu.wgmma(sums_ref, a_smem, b_smem if b_down else b_smem.T)
        # Until then nothing may be fetched in their place. The other warpgroup goes on meanwhile.
        plgpu.wgmma_wait(0)
        return sums_ref

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(nothing, nothing, 0, steps).get_allocations(a_gmem, b_gmem),
        y_smem=plgpu.SMEM(
            (COMPUTE_GROUPS, PIECES, ROWS, width),
            y_gmem.dtype,
            transforms=tiled(y_gmem.dtype, width),
        ),
        collective_axes="warpgroup",
    )
    def _shared(allocations, y_smem):
        @plgpu.nd_loop(grid, collective_axes="program")
        def _tiles(loop):
            here = tile(*loop.index)

            def context(run):
                def summed(sums_ref):
                    run(sums_ref)
                    return sums_ref[...]

                sums = pl.run_scoped(summed, plgpu.ACC((ROWS, columns), jnp.float32))
                for number in range(columns // width):
                    piece, part = number % PIECES, slice(number * width, (number + 1) * width)
                    plgpu.wait_smem_to_gmem(PIECES - 1, wait_read_only=True)
                    y_smem[warpgroup, piece] = sums[:, part].astype(y_gmem.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(y_smem.at[warpgroup, piece], here.y.at[mine, part])

            pipeline(body, context, here.first, here.steps)(here.a, here.b, allocations=allocations)

        plgpu.wait_smem_to_gmem(0)


def _columns(size: int) -> int:
    """How wide a tile of a result `size` wide is."""
    return 256 if size % 256 == 0 else 128


def _across(size: int) -> int:
    return num_blocks(size, _columns(size))


def _rows_kernel(x_gmem, w_gmem, groups_gmem, y_gmem, *, contract: int) -> None:
    """Rows [P, K] in tiles of 128, each by its group's matrix or, `contract=1`, its transpose."""
    (P, N), steps = y_gmem.shape, x_gmem.shape[1] // DEPTH
    plane = P // BLOCK, _across(N)

    def tile(number):
        m, n = in_bands(number, *plane)
        rows, columns = pl.ds(m * BLOCK, BLOCK), pl.ds(n * _columns(N), _columns(N))
        group = groups_gmem[m]
        w = w_gmem.at[jnp.maximum(group, 0)]
        return _Tile(
            a=x_gmem.at[rows],
            b=w.at[columns] if contract else w.at[:, columns],
            first=0,
            steps=jnp.where(group >= 0, steps, 0),
            y=y_gmem.at[rows, columns],
        )

    how = {"down": (False, not contract), "steps": steps}
    _multiply((plane[0] * plane[1],), tile, y_gmem, x_gmem, w_gmem.at[0], **how)


def _matrices_kernel(x_gmem, y_gmem, first_gmem, steps_gmem, dw_gmem) -> None:
    """x^T y over a group's rows [P, K] and [P, N]: `steps_gmem[g]` blocks from `first_gmem[g]`."""
    G, K, N = dw_gmem.shape
    plane = num_blocks(K), _across(N)

    def tile(group, number):
        k, n = in_bands(number, *plane)
        rows, columns = pl.ds(k * BLOCK, BLOCK), pl.ds(n * _columns(N), _columns(N))
        return _Tile(
            a=x_gmem.at[:, rows],
            b=y_gmem.at[:, columns],
            first=first_gmem[group],
            steps=steps_gmem[group],
            y=dw_gmem.at[group, rows, columns],
        )

    how = {"down": (True, True), "steps": x_gmem.shape[0] // DEPTH}
    _multiply((G, plane[0] * plane[1]), tile, dw_gmem, x_gmem, y_gmem, **how)


def _call(kernel: Callable, shape: tuple[int, ...], dtype: DTypeLike, *operands: Array) -> Array:
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(num_programs(),),
        grid_names=("program",),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="warpgroup",
    )(*operands)
    return like(operands[0], y)


def needs(op: str, *operands: Array) -> None:
    """Unsupported unless for Hopper, of BF16, and of sizes that the copy engine takes."""
    needs_hopper(op)
    kinds, shapes = [str(one.dtype) for one in operands], [one.shape for one in operands]
    if set(kinds) != {"bfloat16"}:
        raise Unsupported(f"{op}/gpu wants operands of bfloat16, got {' and '.join(kinds)}")
    if any(0 in shape or shape[-1] % DEPTH for shape in shapes):
        raise Unsupported(
            f"{op}/gpu wants at least one number, and last dimensions by {DEPTH}; got "
            + " and ".join(map(str, shapes))
        )


def tiles_times_matrix(x_PK: Array, w_GKN: Array, tile_groups: Array, contract: int) -> Array:
    """Whole tiles of 128 rows, each by the matrix of its group; zeros where that is negative."""
    shape = x_PK.shape[0], w_GKN.shape[2 - contract]
    kernel = functools.partial(_rows_kernel, contract=contract)
    return _call(kernel, shape, x_PK.dtype, x_PK, w_GKN, tile_groups)


def tiles_transposed_times_tiles(
    x_PK: Array, y_PN: Array, first_G: Array, sizes_G: Array, out_dtype: DTypeLike
) -> Array:
    """x^T y [G, K, N] over rows from tile `first_G`; zeros behind them, to a multiple of 64."""
    shape = sizes_G.shape[0], x_PK.shape[1], y_PN.shape[1]
    first_G, steps_G = first_G * (BLOCK // DEPTH), (sizes_G + DEPTH - 1) // DEPTH
    return _call(_matrices_kernel, shape, out_dtype, x_PK, y_PN, first_G, steps_G)


def rows_times_matrix(x_MK: Array, w_GKN: Array, sizes_G: Array, contract: int) -> Array:
    """Each row against its group's matrix, contracting matrix axis `contract` (0: w, 1: w^T)."""
    needs("grouped_matmul", x_MK, w_GKN)
    layout = tiles(sizes_G, x_MK.shape[0])
    return layout.back(tiles_times_matrix(layout.into(x_MK), w_GKN, layout.group_T, contract))


def rows_transposed_times_rows(
    x_MK: Array, y_MN: Array, sizes_G: Array, out_dtype: DTypeLike
) -> Array:
    """sum over a group's rows of x^T y: [G, K, N], the gradient of the group's matrix."""
    needs("grouped_wgrad", x_MK, y_MN)
    layout = tiles(sizes_G, x_MK.shape[0])
    tiles_G = (sizes_G + BLOCK - 1) // BLOCK
    first_G = jnp.cumsum(tiles_G) - tiles_G
    rows = layout.into(x_MK), layout.into(y_MN)
    return tiles_transposed_times_tiles(*rows, first_G, sizes_G, out_dtype)


matmul = differentiable(rows_times_matrix, rows_transposed_times_rows)
