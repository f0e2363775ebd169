"""Grouped matrix product: rows sorted by group, one matrix per group."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import select
from pallas_kernels.grouped_matmul.blocks import blocks, rows_transposed_times_rows
from pallas_kernels.grouped_matmul.ragged import ragged, ragged_wgrad
from pallas_kernels.grouped_matmul.reference import reference

IMPLEMENTATIONS = {"blocks": blocks, "ragged_dot": ragged, "reference": reference}
WGRADS = {"ragged_dot": ragged_wgrad, "blocks": rows_transposed_times_rows}


def grouped_matmul(
    x_MK: Array, w_GKN: Array, sizes_G: Array, *, implementation: str | None = None
) -> Array:
    """y[m] = x[m] @ w[g(m)] for rows sorted by group g; rows behind the last group give zeros.

    `x_MK` [M, K] and `w_GKN` [G, K, N] of one floating dtype, `sizes_G` [G] int32 with sum at most
    M; sums in at least FP32, result in the dtype of `x_MK`. Differentiable in `x_MK` and `w_GKN`,
    forward and backward without forming anything of G times the rows. `implementation=None` takes
    "ragged_dot" on TPU and "blocks" elsewhere: on CPU and GPU `lax.ragged_dot` costs G times the
    useful work. Raises ValueError for an unknown implementation or shapes that do not fit.
    """
    (_, inner), (groups, rows, _) = x_MK.shape, w_GKN.shape
    if inner != rows or sizes_G.shape != (groups,):
        raise ValueError(
            f"grouped_matmul wants x [M, K], w [G, K, N], sizes [G]; got {x_MK.shape}, "
            f"{w_GKN.shape}, {sizes_G.shape}"
        )
    chosen = select.named("grouped_matmul", IMPLEMENTATIONS, implementation)
    if chosen is None:
        # All of them run everywhere: which is fast is known when the platform is.
        return jax.lax.platform_dependent(x_MK, w_GKN, sizes_G, tpu=ragged, default=blocks)
    return chosen(x_MK, w_GKN, sizes_G)


def grouped_wgrad(
    dy_MN: Array,
    x_MK: Array,
    sizes_G: Array,
    *,
    out_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """dw[g] = dy_g^T x_g [G, N, K] over the rows of each group, sorted as for `grouped_matmul`.

    `dy_MN` and `x_MK` of one floating dtype; sums in at least FP32, rounded to `out_dtype` once.
    """
    if dy_MN.shape[0] != x_MK.shape[0] or sizes_G.ndim != 1:
        raise ValueError(
            f"grouped_wgrad wants dy [M, N], x [M, K], sizes [G]; got {dy_MN.shape}, "
            f"{x_MK.shape}, {sizes_G.shape}"
        )
    chosen = select.named("grouped_wgrad", WGRADS, implementation)
    if chosen is None:
        ragged, blocks = (functools.partial(one, out_dtype=out_dtype) for one in WGRADS.values())
        return jax.lax.platform_dependent(dy_MN, x_MK, sizes_G, tpu=ragged, default=blocks)
    return chosen(dy_MN, x_MK, sizes_G, out_dtype)
