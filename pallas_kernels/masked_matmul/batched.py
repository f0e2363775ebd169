"""One batched product over all places, used or not: what XLA does best."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul.gradients import differentiable
from pallas_kernels.tiles import masked


def _batched(a: Array, b: Array, contracted: tuple[int, int], dtype: DTypeLike) -> Array:
    """Summed in at least FP32 over one dimension of each, rounded to `dtype` once."""
    (over_a, over_b), wide = contracted, np.promote_types(a.dtype, jnp.float32)
    numbers = ((over_a,), (over_b,)), ((0,), (0,))
    return lax.dot_general(a, b, numbers, preferred_element_type=wide).astype(dtype)


def product(x_GMK: Array, w_GKN: Array, sizes_G: Array, contract: int) -> Array:
    """Each place by its group's matrix, contracting matrix axis `contract` (0: w, 1: w^T)."""
    return masked(_batched(x_GMK, w_GKN, (2, contract + 1), x_GMK.dtype), sizes_G)


def wgrad(x_GMK: Array, y_GMN: Array, sizes_G: Array, out_dtype: DTypeLike) -> Array:
    """x^T y [G, K, N] over the places that a row takes."""
    # Both: a NaN times zero would be one.
    return _batched(masked(x_GMK, sizes_G), masked(y_GMN, sizes_G), (1, 1), out_dtype)


matmul = differentiable(product, wgrad)
