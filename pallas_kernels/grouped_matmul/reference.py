"""The definition, for tests: every row against every matrix, then a choice. G times the work."""

import jax.numpy as jnp
from jax import Array


def reference(x_MK: Array, w_GKN: Array, sizes_G: Array) -> Array:
    """See `grouped_matmul`."""
    ends_G = jnp.cumsum(sizes_G)
    row_M = jnp.arange(x_MK.shape[0], dtype=jnp.int32)
    is_mine_MG = (row_M[:, None] >= (ends_G - sizes_G)[None]) & (row_M[:, None] < ends_G[None])
    is_mine_MG1 = is_mine_MG[..., None]
    # Chosen before and after the product: no NaN comes from another group's row or matrix, neither
    # into the result nor into gradients. A factor of zero would let it through.
    x_MGK = jnp.where(is_mine_MG1, x_MK[:, None], 0)
    y_MGN = jnp.einsum("MGK,GKN->MGN", x_MGK, w_GKN)
    return jnp.where(is_mine_MG1, y_MGN, 0).sum(1)
