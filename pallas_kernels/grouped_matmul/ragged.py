"""XLA's own ragged product: the good choice on TPU, and G times too much work elsewhere."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike


def ragged_rows_times_matrix(
    x_MK: Array, w_GKN: Array, sizes_G: Array, contract: int, out_dtype: DTypeLike
) -> Array:
    """Each row against its group's matrix, contracting matrix axis `contract` (0: w, 1: w^T)."""
    contracted = ((1,), (contract + 1,)), ((), ())
    numbers = lax.RaggedDotDimensionNumbers(contracted, [0], [0])
    wide = np.promote_types(x_MK.dtype, jnp.float32)
    y_MN = lax.ragged_dot_general(x_MK, w_GKN, sizes_G, numbers, preferred_element_type=wide)
    return y_MN.astype(out_dtype)


def ragged(x_MK: Array, w_GKN: Array, sizes_G: Array) -> Array:
    """See `grouped_matmul`."""
    return ragged_rows_times_matrix(x_MK, w_GKN, sizes_G, contract=0, out_dtype=x_MK.dtype)


def ragged_wgrad(dy_MN: Array, x_MK: Array, sizes_G: Array, out_dtype: DTypeLike) -> Array:
    """See `grouped_wgrad`."""
    over_rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    wide = np.promote_types(x_MK.dtype, jnp.float32)
    dw_GNK = lax.ragged_dot_general(dy_MN, x_MK, sizes_G, over_rows, preferred_element_type=wide)
    return dw_GNK.astype(out_dtype)
