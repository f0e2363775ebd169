"""Block FP8 as DeepSeek trains in it: e4m3 values, one float32 scale to 128 numbers or 128x128.

    scale = max(amax, 1e-4) / 448      value = x / scale      x ~ value * scale

DeepSeek-V3 report, section 3.3: activations and gradients in tiles of 1x128, weights in blocks of
128x128, each scale from the numbers it belongs to. Both quotients are exact ones rounded once, half
to even, so every backend gives the same bits. `power_of_two=True` ("ue8m0") takes the power of two
at or above amax / 448, division by which is exact. Any sizes: blocks at the right
and lower edge are cut short.

- A block of zeros, or of nothing above its scale / 2**10, gives zeros that keep their signs;
  float32's denormal numbers are among those. Its scale is 1e-4 / 448, or 2**-22 as a power of two.
- A block of one number throughout gives +-448 throughout where that number is at least 1e-4 (with a
  power of two, that number / scale, between 224 and 448).
- A block that holds an infinity or a NaN gives the scale NaN and NaN throughout: nothing computed
  from it can look healthy, and no other block is touched.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import operands, select
from pallas_kernels.quantize import gpu, reference, tpu
from pallas_kernels.quantize.shapes import BLOCK, num_blocks

BACKENDS = {"gpu": gpu, "tpu": tpu, "reference": reference}
ROWS = {name: backend.rows for name, backend in BACKENDS.items()}
COLUMNS = {name: backend.columns for name, backend in BACKENDS.items()}
ROWS_AND_COLUMNS = {name: backend.rows_and_columns for name, backend in BACKENDS.items()}
BLOCKS = {name: backend.blocks for name, backend in BACKENDS.items()}
SWIGLU = {name: backend.swiglu for name, backend in BACKENDS.items()}


def quantize_rows(
    x_MK: Array, *, power_of_two: bool = False, implementation: str | None = None
) -> tuple[Array, Array]:
    """Values [M, K] e4m3 and scales [M, ceil(K/128)] float32 of x [M, K], BF16 or FP32."""
    _check("quantize_rows", x_MK)
    return select.run("quantize_rows", ROWS, implementation, x_MK, power_of_two=power_of_two)


def quantize_columns(
    x_MK: Array, *, power_of_two: bool = False, implementation: str | None = None
) -> tuple[Array, Array]:
    """`quantize_rows` of x^T: values [K, M] and scales [K, ceil(M/128)] of x [M, K].

    What the gradient of a weight contracts over is M, and the tensor cores read FP8 only along the
    contracted axis: so the copy is transposed, and its tiles lie along M.
    """
    _check("quantize_columns", x_MK)
    return select.run("quantize_columns", COLUMNS, implementation, x_MK, power_of_two=power_of_two)


def quantize_rows_and_columns(
    x_MK: Array, *, power_of_two: bool = False, implementation: str | None = None
) -> tuple[Array, Array, Array, Array]:
    """What `quantize_rows` gives, then what `quantize_columns` gives, reading x once."""
    _check("quantize_rows_and_columns", x_MK)
    return select.run(
        "quantize_rows_and_columns",
        ROWS_AND_COLUMNS,
        implementation,
        x_MK,
        power_of_two=power_of_two,
    )


def quantize_blocks(
    w_NK: Array, *, power_of_two: bool = False, implementation: str | None = None
) -> tuple[Array, Array]:
    """Values [N, K] e4m3 and scales [ceil(N/128), ceil(K/128)] float32 of a weight [N, K]."""
    _check("quantize_blocks", w_NK)
    return select.run("quantize_blocks", BLOCKS, implementation, w_NK, power_of_two=power_of_two)


def swiglu_quantize(
    gate_up: Array, *, power_of_two: bool = False, implementation: str | None = None
) -> tuple[Array, Array]:
    """`quantize_rows` of silu(gate) * up: values [M, F], scales [M, ceil(F/128)].

    `gate_up` [M, 2F] holds gate in its first F columns and up in the others. The product is taken
    in FP32 and not rounded before it is quantized. Backends may differ in the last bit of exp, and
    so by one step of e4m3 in a few values.
    """
    _check("swiglu_quantize", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"swiglu_quantize wants gate and up side by side, got {gate_up.shape}")
    return select.run("swiglu_quantize", SWIGLU, implementation, gate_up, power_of_two=power_of_two)


def dequantize_rows(values_MK: Array, scales: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """values * scales for what `quantize_rows` or `quantize_columns` gave, rounded to `dtype`."""
    return _dequantize(values_MK, scales, (1, BLOCK), dtype)


def dequantize_blocks(values_NK: Array, scales: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """values * scales for what `quantize_blocks` gave, rounded to `dtype`."""
    return _dequantize(values_NK, scales, (BLOCK, BLOCK), dtype)


def backend(implementation: str | None) -> str | None:
    """The quantizers' implementation beside a product's one, which may have no namesake here."""
    return implementation if implementation in BACKENDS else None


def _dequantize(values: Array, scales: Array, block: tuple[int, int], dtype: DTypeLike) -> Array:
    operands.check(
        "dequantizing", values=(values, 2, operands.E4M3), scales=(scales, 2, operands.SCALES)
    )
    expected = tuple(num_blocks(n, size) for n, size in zip(values.shape, block, strict=True))
    if scales.shape != expected:
        raise ValueError(f"values {values.shape} have scales {expected}, got {scales.shape}")
    for axis, size in enumerate(block):
        scales = jnp.repeat(scales, size, axis=axis, total_repeat_length=None)
    wide = scales[: values.shape[0], : values.shape[1]]
    return (values.astype(jnp.float32) * wide).astype(dtype)


def _check(op: str, x: Array) -> None:
    operands.check(op, x=(x, 2, operands.NUMBERS))
