"""The definition in plain jnp: pad to whole blocks, take each block's largest, divide, cut off."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize import e4m3
from pallas_kernels.quantize.shapes import BLOCK, num_blocks


def _quantize(x_MK: Array, rows: int, columns: int, power_of_two: bool) -> tuple[Array, Array]:
    """Values [M, K] and scales [ceil(M/rows), ceil(K/columns)] with one scale to rows x columns."""
    num_rows, num_columns = x_MK.shape
    down, along = num_blocks(num_rows, rows), num_blocks(num_columns, columns)
    edges = ((0, down * rows - num_rows), (0, along * columns - num_columns))
    blocks = jnp.pad(x_MK.astype(jnp.float32), edges).reshape(down, rows, along, columns)
    amax = e4m3.magnitude(blocks).max((1, 3), keepdims=True, initial=0)
    scales = e4m3.scales(amax, power_of_two=power_of_two)
    values = e4m3.nearest(blocks, scales, 1 / scales)
    values = values.reshape(down * rows, along * columns)[:num_rows, :num_columns]
    return e4m3.encoded(values), scales[:, 0, :, 0]


def rows(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_rows`."""
    return _quantize(x_MK, 1, BLOCK, power_of_two)


def blocks(w_NK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_blocks`."""
    return _quantize(w_NK, BLOCK, BLOCK, power_of_two)


def columns(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `quantize_columns`."""
    # Bytes are turned, and not all that they are made from: on CPU several times as fast.
    values_MK, scales = lax.optimization_barrier(_quantize(x_MK, BLOCK, 1, power_of_two))
    return values_MK.T, scales.T


def rows_and_columns(x_MK: Array, *, power_of_two: bool) -> tuple[Array, Array, Array, Array]:
    """See `quantize_rows_and_columns`."""
    return *rows(x_MK, power_of_two=power_of_two), *columns(x_MK, power_of_two=power_of_two)


def swiglu(gate_up: Array, *, power_of_two: bool) -> tuple[Array, Array]:
    """See `swiglu_quantize`."""
    gate_MF, up_MF = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return rows(jax.nn.silu(gate_MF) * up_MF, power_of_two=power_of_two)
