"""Mosaic GPU, for Hopper: one block of 128x128 to a program, by the copy engine in and out.

A program reads its block into shared memory once, then goes over it in register tiles of 64x128:
along the rows, or, reading the block transposed, along the columns. Values and scales go back by
way of shared memory. The copy engine fills what lies past the edge with zeros and writes nothing
there. Scales are written with the rows' axis last, as `fp8_matmul` reads them: in a program that
does both, the two transpositions cancel.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chip import needs_hopper
from pallas_kernels.quantize import e4m3
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.select import Unsupported
from pallas_kernels.varying import like

E4M3 = jnp.float8_e4m3fn
# A register tile: with all 128 rows at once, a thread would hold 128 numbers and spill.
ROWS = 64


def _square(dtype):
    """A block in shared memory, as the copy engine lays it out against bank conflicts.

    Tiles 64 wide also where 128 would do: the width has to divide a matrix's, and 576, 2112 and
    10944 are odd multiples of 64.
    """
    width = min(64, 128 // jnp.dtype(dtype).itemsize)
    swizzle = plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(
        (BLOCK, BLOCK), dtype, transforms=(plgpu.TilingTransform((8, width)), swizzle)
    )


def _read(ref) -> Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _fetch(*copies) -> None:
    """Copies (from, to, barrier) into shared memory and waits for all of them."""
    for copy in copies:
        plgpu.copy_gmem_to_smem(*copy)
    for *_, barrier in copies:
        plgpu.barrier_wait(barrier)


def _quantize_rows(read: Callable[[pl.Slice], Array], values_smem, scales_smem, **how) -> None:
    """Each row of a block with its own scale; `read` gives some of its rows in float32."""

    @pl.loop(0, BLOCK // ROWS)
    def _half(half):
        here = pl.ds(half * ROWS, ROWS)
        x = read(here)
        scale = e4m3.scales(e4m3.magnitude(x).max(1), **how)
        wide = (lax.broadcast_in_dim(s, x.shape, (0,)) for s in (scale, 1 / scale))
        values_smem[here] = e4m3.nearest(x, *wide).astype(E4M3)
        scales_smem[here] = scale

    plgpu.commit_smem()


def _place() -> tuple[Array, Array, pl.Slice, pl.Slice]:
    """This program's block: its two numbers, its rows and its columns."""
    m, k = lax.axis_index("m"), lax.axis_index("k")
    return m, k, pl.ds(m * BLOCK, BLOCK), pl.ds(k * BLOCK, BLOCK)


def _rows_kernel(x_gmem, values_gmem, scales_gmem, x_smem, values_smem, scales_smem, ready, **how):
    _, k, rows, columns = _place()
    _fetch((x_gmem.at[rows, columns], x_smem, ready))
    _quantize_rows(lambda here: _read(x_smem.at[here]), values_smem, scales_smem, **how)
    plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[rows, columns])
    plgpu.copy_smem_to_gmem(scales_smem, scales_gmem.at[k, rows])
    plgpu.wait_smem_to_gmem(0)


def _columns_kernel(
    x_gmem, values_gmem, scales_gmem, x_smem, values_smem, scales_smem, ready, **how
):
    m, _, rows, columns = _place()
    _fetch((x_gmem.at[rows, columns], x_smem, ready))
    _quantize_rows(lambda here: _read(x_smem.T.at[here]), values_smem, scales_smem, **how)
    plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[columns, rows])
    plgpu.copy_smem_to_gmem(scales_smem, scales_gmem.at[m, columns])
    plgpu.wait_smem_to_gmem(0)


def _rows_and_columns_kernel(
    x_gmem,
    values_gmem,
    scales_gmem,
    turned_gmem,
    turned_scales_gmem,
    x_smem,
    values_smem,
    scales_smem,
    turned_smem,
    turned_scales_smem,
    ready,
    **how,
):
    m, k, rows, columns = _place()
    _fetch((x_gmem.at[rows, columns], x_smem, ready))
    _quantize_rows(lambda here: _read(x_smem.at[here]), values_smem, scales_smem, **how)
    plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[rows, columns])
    plgpu.copy_smem_to_gmem(scales_smem, scales_gmem.at[k, rows])
    _quantize_rows(lambda here: _read(x_smem.T.at[here]), turned_smem, turned_scales_smem, **how)
    plgpu.copy_smem_to_gmem(turned_smem, turned_gmem.at[columns, rows])
    plgpu.copy_smem_to_gmem(turned_scales_smem, turned_scales_gmem.at[m, columns])
    plgpu.wait_smem_to_gmem(0)


def _swiglu_kernel(
    x_gmem, values_gmem, scales_gmem, gate_smem, up_smem, values_smem, scales_smem, *ready, **how
):
    _, k, rows, columns = _place()
    pair = zip((gate_smem, up_smem), ready, strict=True)
    _fetch(*((x_gmem.at[rows, i, columns], ref, barrier) for i, (ref, barrier) in enumerate(pair)))

    def read(here):
        gate = _read(gate_smem.at[here])
        return gate / (1 + jnp.exp(-gate)) * _read(up_smem.at[here])

    _quantize_rows(read, values_smem, scales_smem, **how)
    plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[rows, columns])
    plgpu.copy_smem_to_gmem(scales_smem, scales_gmem.at[k, rows])
    plgpu.wait_smem_to_gmem(0)


def _blocks_kernel(
    w_gmem, values_gmem, scales_gmem, w_smem, values_smem, scales_smem, ready, **how
):
    n, k, rows, columns = _place()
    _fetch((w_gmem.at[rows, columns], w_smem, ready))
    halves = [e4m3.magnitude(_read(w_smem.at[pl.ds(row, ROWS)])) for row in range(0, BLOCK, ROWS)]
    amax = jnp.maximum(*halves).max(1).max()
    # One number to each row, all alike: Mosaic does not reinterpret the bits of a single number.
    amax = plgpu.layout_cast(lax.broadcast_in_dim(amax, (ROWS,), ()), plgpu.Layout.WGMMA.reduce(1))
    scale = e4m3.scales(amax, **how)
    scales_smem[...] = scale

    @pl.loop(0, BLOCK // ROWS)
    def _half(half):
        here = pl.ds(half * ROWS, ROWS)
        w = _read(w_smem.at[here])
        wide = (lax.broadcast_in_dim(s, w.shape, (0,)) for s in (scale, 1 / scale))
        values_smem[here] = e4m3.nearest(w, *wide).astype(E4M3)

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[rows, columns])
    scales_gmem[n, k] = scales_smem[0]
    plgpu.wait_smem_to_gmem(0)


def _call(op: str, kernel, x: Array, shape, parts: list[str], **how) -> list[Array]:
    """Runs `kernel` over the blocks of `shape` [M, K]; `parts` says what it puts out.

    "rows" and "columns" are values and a scale for each row of a block, "columns" transposed;
    "blocks" are values and a scale for each block.
    """
    needs_hopper(op)
    if not all(shape):
        raise Unsupported(f"{op}/gpu wants numbers, got {tuple(shape)}")
    # The copy engine takes rows by eight, columns by 64: a few tokens are filled up with zeros,
    # which are nobody's largest.
    rows_by = 64 if "columns" in parts else 8
    more = -shape[0] % rows_by, -shape[1] % 64
    x = jnp.pad(x, ((0, more[0]), *[(0, 0)] * (x.ndim - 2), (0, more[1])))
    M, K = (size + extra for size, extra in zip(shape, more, strict=True))
    down, across = num_blocks(M), num_blocks(K)
    kinds = {
        "rows": ((M, K), (across, down * BLOCK)),
        "columns": ((K, M), (down, across * BLOCK)),
        "blocks": ((M, K), (down, across)),
    }
    inputs = x.ndim - 1  # SwiGLU's two lie side by side on an axis of their own
    scratch = [_square(x.dtype)] * inputs
    for part in parts:
        line = plgpu.SMEM((ROWS if part == "blocks" else BLOCK,), jnp.float32)
        scratch += [_square(E4M3), line]
    out = list(
        plgpu.kernel(
            functools.partial(kernel, **how),
            out_type=[
                jax.ShapeDtypeStruct(size, dtype)
                for part in parts
                for size, dtype in zip(kinds[part], (E4M3, jnp.float32), strict=True)
            ],
            grid=(down, across),
            grid_names=("m", "k"),
            scratch_types=[*scratch, *[plgpu.Barrier()] * inputs],
        )(x)
    )
    for number, part in enumerate(parts):
        rows, columns = shape[::-1] if part == "columns" else shape
        values, scales = out[2 * number : 2 * number + 2]
        out[2 * number] = values[:rows, :columns]
        if part != "blocks":
            out[2 * number + 1] = scales.T[:rows]
    return [like(x, one) for one in out]


def rows(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_rows`."""
    how = {"power_of_two": power_of_two}
    return tuple(_call("quantize_rows", _rows_kernel, x_MK, x_MK.shape, ["rows"], **how))


def columns(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_columns`."""
    how = {"power_of_two": power_of_two}
    return tuple(_call("quantize_columns", _columns_kernel, x_MK, x_MK.shape, ["columns"], **how))


def rows_and_columns(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array, Array, Array]:
    """See `quantize_rows_and_columns`."""
    op, parts = "quantize_rows_and_columns", ["rows", "columns"]
    how = {"power_of_two": power_of_two}
    return tuple(_call(op, _rows_and_columns_kernel, x_MK, x_MK.shape, parts, **how))


def blocks(w_NK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_blocks`."""
    how = {"power_of_two": power_of_two}
    return tuple(_call("quantize_blocks", _blocks_kernel, w_NK, w_NK.shape, ["blocks"], **how))


def swiglu(gate_up: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `swiglu_quantize`."""
    shape = gate_up.shape[0], gate_up.shape[1] // 2
    pair_M2F = gate_up.reshape(shape[0], 2, shape[1])
    how = {"power_of_two": power_of_two}
    return tuple(_call("swiglu_quantize", _swiglu_kernel, pair_M2F, shape, ["rows"], **how))
