"""A linear layer whose three matrix products are block FP8, as DeepSeek-V3 trains."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import operands
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.quantize import (
    backend,
    quantize_blocks,
    quantize_rows,
    quantize_rows_and_columns,
)
from pallas_kernels.varying import alike


def fp8_linear(
    x_MK: Array,
    w_NK: Array,
    *,
    weight_grad: str = "fp8",
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Array:
    """y = x w^T [M, N] in the dtype of `x_MK`; x [M, K] and w [N, K] are BF16 or FP32.

        y  = Q1(x) Qb(w)^T      dx = Q1(dy) Qb(w)      dw = Q1(dy^T) Q1(x^T)^T

    Q1 are tiles of 128 along what is summed over, Qb blocks of 128x128, all scales from the numbers
    at hand (DeepSeek-V3 report, section 3.3). `weight_grad="exact"` takes dw = dy^T x of what came
    in, summed in FP32; "fp8" keeps x for it in one byte a number. Gradients have the dtypes of
    their arguments. `implementation` is that of every product inside, and of every quantizer where
    there is one of that name.
    """
    if weight_grad not in ("fp8", "exact"):
        raise ValueError(f"weight_grad {weight_grad!r}; there are 'fp8' and 'exact'")
    numbers = operands.NUMBERS
    operands.check("fp8_linear", x=(x_MK, 2, numbers), w=(w_NK, 2, numbers))
    if x_MK.shape[1] != w_NK.shape[1]:
        raise ValueError(f"fp8_linear wants x [M, K], w [N, K]; got {x_MK.shape}, {w_NK.shape}")
    return _linear(*alike(x_MK, w_NK), weight_grad, power_of_two, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x_MK, w_NK, weight_grad, power_of_two, implementation):
    how = {"power_of_two": power_of_two, "implementation": backend(implementation)}
    x, w = quantize_rows(x_MK, **how), quantize_blocks(w_NK, **how)
    return fp8_matmul(*x, *w, out_dtype=x_MK.dtype, implementation=implementation)


def _forward(x_MK, w_NK, weight_grad, power_of_two, implementation):
    how = {"power_of_two": power_of_two, "implementation": backend(implementation)}
    w = quantize_blocks(w_NK, **how)
    if weight_grad == "fp8":
        *x, values_KM, scales = quantize_rows_and_columns(x_MK, **how)
        kept = values_KM, scales
    else:
        x, kept = quantize_rows(x_MK, **how), x_MK
    y_MN = fp8_matmul(*x, *w, out_dtype=x_MK.dtype, implementation=implementation)
    # Empty arrays stand for dtypes, which are no values that can be kept.
    return y_MN, (kept, w, jnp.zeros(0, x_MK.dtype), jnp.zeros(0, w_NK.dtype))


def _backward(weight_grad, power_of_two, implementation, saved, dy_MN):
    how = {"power_of_two": power_of_two, "implementation": backend(implementation)}
    kept, (w_NK, w_scales), like_x, like_w = saved
    if weight_grad == "fp8":
        *dy, dy_NM, scales = quantize_rows_and_columns(dy_MN, **how)
        dw_NK = fp8_matmul(
            *(dy_NM, scales, *kept), out_dtype=like_w.dtype, implementation=implementation
        )
    else:
        dy = quantize_rows(dy_MN, **how)
        dw_NK = lax.dot_general(
            *(dy_MN, kept, (((0,), (0,)), ((), ()))),
            precision=operands.precision(kept.dtype),
            preferred_element_type=jnp.float32,
        ).astype(like_w.dtype)
    # Blocks of 128x128 are blocks of the transposed matrix, too.
    w = w_NK.T, w_scales.T
    return fp8_matmul(*dy, *w, out_dtype=like_x.dtype, implementation=implementation), dw_NK


_linear.defvjp(_forward, _backward)
