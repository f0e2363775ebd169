"""Grouped matrix product where every group has the same number of places for rows."""

from jax import Array

from pallas_kernels import operands, select
from pallas_kernels.masked_matmul import batched, gpu

IMPLEMENTATIONS = {"batched": batched.matmul, "gpu": gpu.matmul}


def masked_matmul(
    x_GMK: Array, w_GKN: Array, sizes_G: Array, *, implementation: str | None = None
) -> Array:
    """y[g, m] = x[g, m] @ w[g] in the first `sizes_G[g]` places m of each group, zeros behind them.

    DeepGEMM's masked layout, for generating: where tokens go is known on the device alone, and
    shapes have room for the most. `x_GMK` [G, M, K] and `w_GKN` [G, K, N] of one floating dtype,
    `sizes_G` [G] int32; sums in at least FP32, result in the dtype of `x_GMK`. What lies in places
    not used is not looked at. Differentiable in `x_GMK` and `w_GKN`. "batched", one product of all
    places, is the default everywhere; "gpu", for BF16 on Hopper, multiplies tiles of 128 places
    that have a row, and has never been timed on a chip.
    """
    operands.check(
        "masked_matmul",
        x=(x_GMK, 3, operands.FLOATS),
        w=(w_GKN, 3, (x_GMK.dtype.type,)),
        sizes=(sizes_G, 1, operands.COUNTS),
    )
    (G, _, K), N = x_GMK.shape, w_GKN.shape[2]
    if w_GKN.shape != (G, K, N) or sizes_G.shape != (G,):
        raise ValueError(
            f"masked_matmul wants x [G, M, K], w [G, K, N] and sizes [G]; got {x_GMK.shape}, "
            f"{w_GKN.shape}, {sizes_G.shape}"
        )
    return select.run("masked_matmul", IMPLEMENTATIONS, implementation, x_GMK, w_GKN, sizes_G)
