"""Mosaic GPU, for Hopper: the kernels of `grouped_matmul/gpu.py`, over tiles that have a row."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul.gpu import (
    needs,
    tiles_times_matrix,
    tiles_transposed_times_tiles,
)
from pallas_kernels.grouped_matmul.gradients import differentiable
from pallas_kernels.quantize.shapes import num_blocks
from pallas_kernels.tiles import masked, places

OP = "masked_matmul"


def product(x_GMK: Array, w_GKN: Array, sizes_G: Array, contract: int) -> Array:
    """Each place by its group's matrix, contracting matrix axis `contract` (0: w, 1: w^T)."""
    needs(OP, x_GMK, w_GKN)
    layout = places(sizes_G, x_GMK.shape[1])
    return layout.back(tiles_times_matrix(layout.into(x_GMK), w_GKN, layout.group_T, contract))


def wgrad(x_GMK: Array, y_GMN: Array, sizes_G: Array, out_dtype: DTypeLike) -> Array:
    """x^T y [G, K, N] over the places that a row takes."""
    needs(OP, x_GMK, y_GMN)
    G, M, _ = x_GMK.shape
    layout = places(sizes_G, M)
    first_G = num_blocks(M) * jnp.arange(G, dtype=jnp.int32)
    # Both: a NaN times zero would be one.
    rows = (layout.into(masked(one, sizes_G)) for one in (x_GMK, y_GMN))
    return tiles_transposed_times_tiles(*rows, first_G, sizes_G, out_dtype)


matmul = differentiable(product, wgrad)
