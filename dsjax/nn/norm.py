"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.params import upcast


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x^2) + eps) * scale, computed in FP32, in the dtype it was given."""

    def __init__(self, size: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = upcast(x)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = upcast(self.scale[...])
        normed = (
            wide * jax.lax.rsqrt(mean_square + self.eps) * jnp.expand_dims(scale, range(x.ndim - 1))
        )
        return normed.astype(x.dtype)
