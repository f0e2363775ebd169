"""Grouped matrix product: rows sorted by group, one matrix per group."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import operands, select
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.blocks import blocks, rows_transposed_times_rows
from pallas_kernels.grouped_matmul.ragged import ragged, ragged_wgrad
from pallas_kernels.grouped_matmul.reference import reference

IMPLEMENTATIONS = {
    "blocks": blocks,
    "ragged_dot": ragged,
    "reference": reference,
    "gpu": gpu.matmul,
}
WGRADS = {
    "ragged_dot": ragged_wgrad,
    "blocks": rows_transposed_times_rows,
    "gpu": gpu.rows_transposed_times_rows,
}


def grouped_matmul(
    x_MK: Array, w_GKN: Array, sizes_G: Array, *, implementation: str | None = None
) -> Array:
    """y[m] = x[m] @ w[g(m)] for rows sorted by group g; rows behind the last group give zeros.

    `x_MK` [M, K] and `w_GKN` [G, K, N] of one floating dtype, `sizes_G` [G] int32 with sum at most
    M; sums in at least FP32, result in the dtype of `x_MK`. Differentiable in `x_MK` and `w_GKN`,
    forward and backward without forming anything of G times the rows. `implementation=None` takes
    "ragged_dot" on TPU and "blocks" elsewhere: on CPU and GPU `lax.ragged_dot` costs G times the
    useful work. "gpu" is for BF16 on Hopper, K and N by 64; it is not the default there, because it
    has never been timed on a chip. Raises ValueError for an unknown implementation or shapes that
    do not fit.
    """
    operands.check(
        "grouped_matmul",
        x=(x_MK, 2, operands.FLOATS),
        w=(w_GKN, 3, (x_MK.dtype.type,)),
        sizes=(sizes_G, 1, operands.COUNTS),
    )
    (_, inner), (groups, rows, _) = x_MK.shape, w_GKN.shape
    if inner != rows or sizes_G.shape != (groups,):
        raise ValueError(
            f"grouped_matmul wants x [M, K], w [G, K, N], sizes [G]; got {x_MK.shape}, "
            f"{w_GKN.shape}, {sizes_G.shape}"
        )
    if select.named("grouped_matmul", IMPLEMENTATIONS, implementation) is None:
        # Both of them run everywhere: which is fast is known when the platform is.
        return jax.lax.platform_dependent(x_MK, w_GKN, sizes_G, tpu=ragged, default=blocks)
    return select.run("grouped_matmul", IMPLEMENTATIONS, implementation, x_MK, w_GKN, sizes_G)


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
    Implementations as of `grouped_matmul`.
    """
    operands.check(
        "grouped_wgrad",
        out_dtype=out_dtype,
        dy=(dy_MN, 2, operands.FLOATS),
        x=(x_MK, 2, (dy_MN.dtype.type,)),
        sizes=(sizes_G, 1, operands.COUNTS),
    )
    if dy_MN.shape[0] != x_MK.shape[0]:
        raise ValueError(
            f"grouped_wgrad wants dy [M, N], x [M, K], sizes [G]; got {dy_MN.shape}, "
            f"{x_MK.shape}, {sizes_G.shape}"
        )
    if select.named("grouped_wgrad", WGRADS, implementation) is None:
        on_tpu, elsewhere = (
            functools.partial(WGRADS[name], out_dtype=out_dtype)
            for name in ("ragged_dot", "blocks")
        )
        return jax.lax.platform_dependent(dy_MN, x_MK, sizes_G, tpu=on_tpu, default=elsewhere)
    return select.run(
        *("grouped_wgrad", WGRADS, implementation), *(dy_MN, x_MK, sizes_G), out_dtype=out_dtype
    )
