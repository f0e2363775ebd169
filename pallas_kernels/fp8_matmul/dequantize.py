"""Values times scales, then one ordinary product of FP32, what a CPU does best; or of BF16.

FP32 differs from `reference` by roundings of FP32 alone: here each factor x * xs and w * ws is
rounded once and all K products are added up in the order of the platform's own matrix product;
there 128 exact products at a time are added first, and the product of the two scales is rounded.

In BF16 each factor is rounded to 8 bits as well, by 2**-9 of it at most and not at all where scales
are powers of two; sums are FP32. What tensor cores and matrix units without FP8 do best.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.operands import precision
from pallas_kernels.quantize import dequantize_blocks, dequantize_rows


def matmul(
    x_MK: Array,
    x_scales: Array,
    w_NK: Array,
    w_scales: Array,
    *,
    out_dtype: DTypeLike,
    factors: DTypeLike = jnp.float32,
) -> Array:
    """See `fp8_matmul`."""
    by_column = w_scales.shape[0] == w_NK.shape[0]
    x_MK = dequantize_rows(x_MK, x_scales, factors)
    w_NK = (dequantize_rows if by_column else dequantize_blocks)(w_NK, w_scales, factors)
    return product(x_MK, w_NK).astype(out_dtype)


matmul_bf16 = functools.partial(matmul, factors=jnp.bfloat16)


def product(x_MK: Array, w_NK: Array) -> Array:
    """x w^T, summed in FP32."""
    return lax.dot_general(
        x_MK,
        w_NK,
        (((1,), (1,)), ((), ())),
        precision=precision(x_MK.dtype),
        preferred_element_type=jnp.float32,
    )
