"""Values times scales, then one batched product, as `fp8_matmul/dequantize.py` has it."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.fp8_grouped_matmul.dequantize import dequantize_matrices
from pallas_kernels.operands import precision
from pallas_kernels.quantize import dequantize_rows
from pallas_kernels.tiles import masked


def matmul(
    x_GMK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    sizes_G: Array,
    *,
    out_dtype: DTypeLike,
    factors: DTypeLike = jnp.float32,
) -> Array:
    """See `fp8_masked_matmul`."""
    y_GMN = lax.dot_general(
        jax.vmap(lambda *one: dequantize_rows(*one, factors))(x_GMK, x_scales),
        dequantize_matrices(w_GNK, w_scales, factors),
        (((2,), (2,)), ((0,), (0,))),
        precision=precision(factors),
        preferred_element_type=jnp.float32,
    )
    return masked(y_GMN, sizes_G).astype(out_dtype)


matmul_bf16 = functools.partial(matmul, factors=jnp.bfloat16)
