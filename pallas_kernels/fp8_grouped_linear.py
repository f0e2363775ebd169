"""Linear layers of experts whose three grouped products are block FP8, as DeepSeek-V3 trains."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import operands
from pallas_kernels.fp8_grouped_matmul import fp8_sorted_matmul
from pallas_kernels.fp8_grouped_wgrad import fp8_grouped_wgrad
from pallas_kernels.grouped_matmul import grouped_wgrad
from pallas_kernels.quantize import backend, quantize_blocks, quantize_columns, quantize_rows
from pallas_kernels.quantize.shapes import BLOCK
from pallas_kernels.tiles import tiles
from pallas_kernels.varying import alike


def fp8_grouped_linear(
    x_MK: Array,
    w_GNK: Array,
    sizes_G: Array,
    *,
    weight_grad: str = "fp8",
    power_of_two: bool = False,
    x_power_of_two: bool | None = None,
    implementation: str | None = None,
) -> Array:
    """y[m] = x[m] w[g(m)]^T [M, N] for rows sorted by group g; rows behind the last give zeros.

        y  = Q1(x) Qb(w[g])^T      dx = Q1(dy) Qb(w[g])      dw[g] = Q1(dy_g^T) Q1(x_g^T)^T

    `x_MK` [M, K] and `w_GNK` [G, N, K] are BF16 or FP32, `sizes_G` [G] int32 with sum at most M; y
    has the dtype of x, gradients those of their arguments. Q1 are tiles of 128 along what is summed
    over, Qb blocks of 128x128, all scales from the numbers at hand (DeepSeek-V3 report, section
    3.3). x_g and dy_g are a group's rows; for dw their tiles begin with the group, whose last is
    filled up with zeros. `weight_grad="exact"` takes dw[g] = dy_g^T x_g of what came in, summed in
    FP32; "fp8" keeps x for it in one byte a number.

    `power_of_two` is the kind of all scales but those of x, whose `x_power_of_two` says (None: the
    same). Rows that were quantized with powers of two before, to be sent here in FP8, come through
    a second quantization to the bit. `implementation` is that of every product inside, and of
    every quantizer where there is one of that name.
    """
    if weight_grad not in ("fp8", "exact"):
        raise ValueError(f"weight_grad {weight_grad!r}; there are 'fp8' and 'exact'")
    operands.check(
        "fp8_grouped_linear",
        x=(x_MK, 2, operands.NUMBERS),
        w=(w_GNK, 3, operands.NUMBERS),
        sizes=(sizes_G, 1, operands.COUNTS),
    )
    if x_MK.shape[1] != w_GNK.shape[2] or sizes_G.shape != w_GNK.shape[:1]:
        raise ValueError(
            "fp8_grouped_linear wants x [M, K], w [G, N, K], sizes [G]; got "
            f"{x_MK.shape}, {w_GNK.shape}, {sizes_G.shape}"
        )
    x_power_of_two = power_of_two if x_power_of_two is None else x_power_of_two
    how = weight_grad, power_of_two, x_power_of_two, implementation
    return _linear(*alike(x_MK, w_GNK, sizes_G), *how)


def quantize_matrices(w_GNK: Array, **how) -> tuple[Array, Array]:
    """`quantize_blocks` of each group's matrix: blocks begin with it."""
    G, N, K = w_GNK.shape
    # Below one another, with rows of zeros between where a block would reach into the next.
    below = jnp.pad(w_GNK, ((0, 0), (0, -N % BLOCK), (0, 0))).reshape(-1, K)
    values, scales = quantize_blocks(below, **how)
    return values.reshape(G, below.shape[0] // G, K)[:, :N], scales.reshape(G, -1, scales.shape[1])


def _product(x_MK, w_GNK, sizes_G, power_of_two, x_power_of_two, implementation):
    """y, and the quantized w."""
    quantizer = backend(implementation)
    x = quantize_rows(x_MK, power_of_two=x_power_of_two, implementation=quantizer)
    w = quantize_matrices(w_GNK, power_of_two=power_of_two, implementation=quantizer)
    operands = *x, *w, sizes_G
    return fp8_sorted_matmul(*operands, out_dtype=x_MK.dtype, implementation=implementation), w


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _linear(x_MK, w_GNK, sizes_G, weight_grad, *how):
    return _product(x_MK, w_GNK, sizes_G, *how)[0]


def _forward(x_MK, w_GNK, sizes_G, weight_grad, power_of_two, x_power_of_two, implementation):
    y_MN, w = _product(x_MK, w_GNK, sizes_G, power_of_two, x_power_of_two, implementation)
    if weight_grad == "fp8":
        in_tiles = tiles(sizes_G, x_MK.shape[0]).into(x_MK)
        how = {"power_of_two": x_power_of_two, "implementation": backend(implementation)}
        kept = quantize_columns(in_tiles, **how)
    else:
        kept = x_MK
    # Empty arrays stand for dtypes, which are no values that can be kept.
    return y_MN, (kept, w, sizes_G, jnp.zeros(0, x_MK.dtype), jnp.zeros(0, w_GNK.dtype))


def _backward(weight_grad, power_of_two, x_power_of_two, implementation, saved, dy_MN):
    kept, (w_GNK, w_scales), sizes_G, like_x, like_w = saved
    how = {"power_of_two": power_of_two, "implementation": backend(implementation)}
    # Blocks of 128x128 are blocks of the transposed matrix, too.
    w = w_GNK.swapaxes(1, 2), w_scales.swapaxes(1, 2)
    dx_MK = fp8_sorted_matmul(
        *(*quantize_rows(dy_MN, **how), *w, sizes_G),
        out_dtype=like_x.dtype,
        implementation=implementation,
    )
    if weight_grad == "fp8":
        layout = tiles(sizes_G, dy_MN.shape[0])
        dw_GNK = fp8_grouped_wgrad(
            *(*quantize_columns(layout.into(dy_MN), **how), *kept, layout.group_T, len(w_GNK)),
            out_dtype=like_w.dtype,
            implementation=implementation,
        )
    else:
        # FP32 that came in is multiplied as it is, on platforms too that would round it by default.
        exactly = "highest" if kept.dtype == jnp.float32 else None
        with jax.default_matmul_precision(exactly):
            dw_GNK = grouped_wgrad(dy_MN, kept, sizes_G, out_dtype=like_w.dtype)
    return dx_MK, dw_GNK, None


_linear.defvjp(_forward, _backward)
