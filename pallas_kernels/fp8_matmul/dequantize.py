"""Values times scales, then one ordinary product in FP32: what a CPU does best.

It differs from `reference` by roundings of FP32 alone: here each factor x * xs and w * ws is
rounded once and all K products are added up in the order of the platform's own matrix product;
there 128 exact products at a time are added first, and the product of the two scales is rounded.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.quantize import dequantize_blocks, dequantize_rows


def matmul(
    x_MK: Array, x_scales: Array, w_NK: Array, w_scales: Array, *, out_dtype: DTypeLike
) -> Array:
    """See `fp8_matmul`."""
    by_column = w_scales.shape[0] == w_NK.shape[0]
    x_MK = dequantize_rows(x_MK, x_scales)
    w_NK = (dequantize_rows if by_column else dequantize_blocks)(w_NK, w_scales)
    return product(x_MK, w_NK).astype(out_dtype)


def product(x_MK: Array, w_NK: Array) -> Array:
    """x w^T of FP32 in FP32, on platforms too that would round the factors by default."""
    return lax.dot_general(
        x_MK,
        w_NK,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
