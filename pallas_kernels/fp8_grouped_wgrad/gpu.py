"""Mosaic GPU, for Hopper: the kernel of `fp8_matmul/gpu.py`, over as many tiles as a group has."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.chip import needs_hopper, num_programs
from pallas_kernels.fp8_matmul.gpu import (
    COMPUTE_GROUPS,
    ROWS,
    STAGES,
    WGMMA,
    add_products,
    in_bands,
    tiled,
)
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.select import Unsupported
from pallas_kernels.tiles import counts
from pallas_kernels.varying import like


def _kernel(
    dy_gmem, dy_scales_gmem, x_gmem, x_scales_gmem, first_gmem, count_gmem, dw_gmem, *, stages: int
) -> None:
    """Group g has `count_gmem[g]` tiles from `first_gmem[g]` on; scales are [tiles, rows]."""
    G, N, K = dw_gmem.shape
    down, across = num_blocks(N), num_blocks(K)
    warpgroup = lax.axis_index("warpgroup")
    mine = pl.ds(warpgroup * ROWS, ROWS)
    operand = {"transforms": tiled(x_gmem.dtype, BLOCK), "memory_space": plgpu.SMEM}

    def pipeline(body, context, first, count):
        tile = plgpu.BlockSpec((BLOCK, BLOCK), lambda t: (0, first + t), **operand)
        line = plgpu.BlockSpec((1, BLOCK), lambda t: (first + t, 0), memory_space=plgpu.SMEM)
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(count,),
            in_specs=[tile, tile, line, line],
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=COMPUTE_GROUPS,
            max_concurrent_steps=stages,
            compute_context=context,
        )

    def nothing(*_, **__):
        pass

    allocations = pipeline(nothing, nothing, 0, stages).get_allocations(
        dy_gmem, x_gmem, dy_scales_gmem, x_scales_gmem
    )

    @functools.partial(
        pl.run_scoped,
        allocations=allocations,
        dw_smem=plgpu.SMEM(
            (COMPUTE_GROUPS, ROWS, BLOCK),
            dw_gmem.dtype,
            transforms=tiled(dw_gmem.dtype, 128 // jnp.dtype(dw_gmem.dtype).itemsize),
        ),
        collective_axes="warpgroup",
    )
    def _shared(allocations, dw_smem):
        @plgpu.nd_loop((G, down * across), collective_axes="program")
        def _tiles(loop):
            group, number = loop.index
            n, k = in_bands(number, down, across)
            rows, columns = pl.ds(n * BLOCK, BLOCK), pl.ds(k * BLOCK, BLOCK)

            def context(run):
                sums = run(plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), WGMMA))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dw_smem[warpgroup] = sums.astype(dw_gmem.dtype)
                plgpu.commit_smem()
                to = dw_gmem.at[group, rows, columns].at[mine]
                plgpu.copy_smem_to_gmem(dw_smem.at[warpgroup], to)

            def body(_, dy_smem, x_smem, dy_scales_smem, x_scales_smem, sums):
                dy_scales = dy_scales_smem.at[0, mine]
                return add_products(sums, dy_smem.at[mine], x_smem, dy_scales, x_scales_smem)

            pipeline(body, context, first_gmem[group], count_gmem[group])(
                dy_gmem.at[rows],
                x_gmem.at[columns],
                dy_scales_gmem.at[:, rows],
                x_scales_gmem.at[:, columns],
                allocations=allocations,
            )

        plgpu.wait_smem_to_gmem(0)


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
    needs_hopper(op)
    (N, M), K, itemsize = dy_NM.shape, x_KM.shape[0], jnp.dtype(out_dtype).itemsize
    if not M or not N or not K or N % 8 or K % (128 // itemsize):
        raise Unsupported(
            f"{op}/gpu wants N by 8 and K by {128 // itemsize} for {jnp.dtype(out_dtype)}, "
            f"got N={N}, K={K}, M={M}"
        )
    count_G = counts(tile_groups, num_groups)
    kernel = plgpu.kernel(
        functools.partial(_kernel, stages=min(STAGES - (itemsize == 4), M // BLOCK)),
        out_type=jax.ShapeDtypeStruct((num_groups, N, K), out_dtype),
        grid=(num_programs(),),
        grid_names=("program",),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="warpgroup",
    )
    first_G = jnp.cumsum(count_G) - count_G
    return like(dy_NM, kernel(dy_NM, dy_scales.T, x_KM, x_scales.T, first_G, count_G))
