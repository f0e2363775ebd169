"""Values times scales, then one batched product in FP32, as `fp8_matmul/dequantize.py` has it."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.fp8_grouped_matmul.dequantize import dequantize_matrices
from pallas_kernels.quantize import dequantize_rows


def matmul(
    x_GMK: Array,
    x_scales: Array,
    w_GNK: Array,
    w_scales: Array,
    sizes_G: Array,
    *,
    out_dtype: DTypeLike,
) -> Array:
    """See `fp8_masked_matmul`."""
    y_GMN = lax.dot_general(
        jax.vmap(dequantize_rows)(x_GMK, x_scales),
        dequantize_matrices(w_GNK, w_scales),
        (((2,), (2,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return masked(y_GMN, sizes_G).astype(out_dtype)


def masked(y_GMN: Array, sizes_G: Array) -> Array:
    """Zeros in the places that no row takes."""
    place_M = jnp.arange(y_GMN.shape[1], dtype=jnp.int32)
    return jnp.where((place_M[None] < sizes_G[:, None])[..., None], y_GMN, 0)
