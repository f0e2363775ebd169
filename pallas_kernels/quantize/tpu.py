"""Mosaic TPU: blocks of 128x128, eight below one another to a step of the grid.

What lies past the edge is made zero in the kernel; the pipeline does not write it back. Scales
leave as lines of 128 with an axis of one before them, which is the shape that a TPU writes without
a thought, and are turned by XLA.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.chip import needs_tpu
from pallas_kernels.quantize import e4m3
from pallas_kernels.quantize.shapes import BLOCK, num_blocks
from pallas_kernels.select import Unsupported

E4M3 = jnp.float8_e4m3fn
MOST_AT_ONCE = 8


def _read(x_ref, number: int, shape: tuple[int, int]) -> Array:
    """Block `number` of this step in float32, zero outside of the matrix."""
    x = x_ref[number * BLOCK : (number + 1) * BLOCK].astype(jnp.float32)
    down = pl.program_id(0) * x_ref.shape[0] + number * BLOCK
    row = down + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    column = pl.program_id(1) * BLOCK + lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((row < shape[0]) & (column < shape[1]), x, 0)


def _quantize(x: Array, axis: int | tuple[int, int], power_of_two: bool) -> tuple[Array, Array]:
    """Values of a block and its scales, spread over the whole block."""
    amax = e4m3.magnitude(x).max(axis, keepdims=True)
    scale = jnp.broadcast_to(e4m3.scales(amax, power_of_two=power_of_two), x.shape)
    return e4m3.nearest(x, scale, 1 / scale).astype(E4M3), scale


def _rows(x: Array, number: int, values_ref, scales_ref, power_of_two: bool) -> None:
    here = slice(number * BLOCK, (number + 1) * BLOCK)
    values_ref[here], scale = _quantize(x, 1, power_of_two)
    scales_ref[0, :, here] = scale.T[:1]


def _columns(x: Array, number: int, values_ref, scales_ref, power_of_two: bool) -> None:
    here = slice(number * BLOCK, (number + 1) * BLOCK)
    values_ref[:, here], scale = _quantize(x.T, 1, power_of_two)
    scales_ref[number] = scale.T[:1]


def _blocks(x: Array, number: int, values_ref, scales_ref, power_of_two: bool) -> None:
    here = slice(number * BLOCK, (number + 1) * BLOCK)
    values_ref[here], scale = _quantize(x, (0, 1), power_of_two)
    scales_ref[number] = scale[:1]


def _silu(x: Array) -> Array:
    return x / (1 + jnp.exp(-x))


def _kernel(*refs, parts, shape, inputs: int, power_of_two: bool):
    sources, outputs = refs[:inputs], refs[inputs:]
    for number in range(sources[0].shape[0] // BLOCK):
        x, *up = (_read(ref, number, shape) for ref in sources)
        if up:
            x = _silu(x) * up[0]
        for i, part in enumerate(parts):
            part(x, number, *outputs[2 * i : 2 * i + 2], power_of_two)


def _call(op: str, sources: list[Array], parts: list, power_of_two: bool) -> tuple[Array, ...]:
    needs_tpu(op)
    M, K = sources[0].shape
    if not M or not K:
        raise Unsupported(f"{op}/tpu wants numbers, got {sources[0].shape}")
    down, across = num_blocks(M), num_blocks(K)
    at_once = min(down, MOST_AT_ONCE)
    rows, steps = at_once * BLOCK, num_blocks(down, at_once)
    tall = pl.BlockSpec((rows, BLOCK), lambda m, k: (m, k))
    wide = pl.BlockSpec((BLOCK, rows), lambda m, k: (k, m))
    lines = pl.BlockSpec((at_once, 1, BLOCK), lambda m, k: (m, 0, k))
    kinds = {
        _rows: ((M, K), tall, (across, 1, M), pl.BlockSpec((1, 1, rows), lambda m, k: (k, 0, m))),
        _columns: ((K, M), wide, (down, 1, K), lines),
        _blocks: ((M, K), tall, (down, 1, across * BLOCK), lines),
    }
    # Inside of `jax.shard_map`: over which axes of the mesh the results vary.
    varying = jax.typeof(sources[0]).manual_axis_type
    out_shape, out_specs = [], []
    for values, values_spec, scales, scales_spec in map(kinds.__getitem__, parts):
        out_shape += [
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
            for shape, dtype in ((values, E4M3), (scales, jnp.float32))
        ]
        out_specs += [values_spec, scales_spec]
    return tuple(
        pl.pallas_call(
            functools.partial(
                _kernel, parts=parts, shape=(M, K), inputs=len(sources), power_of_two=power_of_two
            ),
            grid=(steps, across),
            in_specs=[tall] * len(sources),
            out_specs=out_specs,
            out_shape=out_shape,
            cost_estimate=pl.CostEstimate(
                flops=20 * M * K * len(parts),
                transcendentals=M * K * (len(sources) - 1),
                bytes_accessed=M * K * (len(sources) * sources[0].dtype.itemsize + len(parts)),
            ),
            name=op,
        )(*sources)
    )


def rows(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_rows`."""
    values_MK, scales = _call("quantize_rows", [x_MK], [_rows], power_of_two)
    return values_MK, scales[:, 0].T


def columns(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_columns`."""
    values_KM, scales = _call("quantize_columns", [x_MK], [_columns], power_of_two)
    return values_KM, scales[:, 0].T


def rows_and_columns(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array, Array, Array]:
    """See `quantize_rows_and_columns`."""
    parts = [_rows, _columns]
    by_row, row_scales, by_column, column_scales = _call(
        "quantize_rows_and_columns", [x_MK], parts, power_of_two
    )
    return by_row, row_scales[:, 0].T, by_column, column_scales[:, 0].T


def blocks(w_NK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_blocks`."""
    values_NK, scales = _call("quantize_blocks", [w_NK], [_blocks], power_of_two)
    return values_NK, scales[:, 0, ::BLOCK]


def swiglu(gate_up: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `swiglu_quantize`."""
    pair = jnp.split(gate_up, 2, axis=1)  # two copies, where XLA cannot make them part of others
    values_MF, scales = _call("swiglu_quantize", pair, [_rows], power_of_two)
    return values_MF, scales[:, 0].T
