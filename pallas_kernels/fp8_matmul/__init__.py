"""Matrix product of block FP8: 128 products at a time, then FP32."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import operands, select
from pallas_kernels.fp8_matmul import dequantize, gpu, reference, tpu, tpu_wide
from pallas_kernels.quantize.shapes import num_blocks

IMPLEMENTATIONS = {
    "gpu": gpu.matmul,
    "tpu": tpu.matmul,
    "dequantize_bf16": dequantize.matmul_bf16,
    "dequantize": dequantize.matmul,
    "reference": reference.matmul,
    # Behind the one that takes everything: it runs where it is named, for its numbers are others.
    "tpu_wide": tpu_wide.matmul,
}


def fp8_matmul(
    x_MK: Array,
    x_scales: Array,
    w_NK: Array,
    w_scales: Array,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Array:
    """y = x w^T of e4m3 values and their scales, rounded to `out_dtype` once.

        y[m, n] = sum_b xs[m, b] ws[n, b] (sum_{k in block b} x[m, k] w[n, k])

    The inner sum of 128 products, their scaling and the outer sum are in FP32: tensor cores alone
    keep some 14 bits of a sum of FP8 products (DeepSeek-V3 report, section 3.3.2). `x_MK` [M, K]
    with scales [M, ceil(K/128)] as `quantize_rows` gives them. `w_NK` [N, K] with scales either
    [ceil(N/128), ceil(K/128)] as from `quantize_blocks`, or [N, ceil(K/128)] as from
    `quantize_rows` and `quantize_columns`: the form of a weight's gradient. Any M, N and K.
    "dequantize_bf16" rounds the factors to BF16 first: the default on TPUs that have no FP8, and on
    other accelerators where no kernel fits. "tpu_wide" computes something else; see its file.
    Differentiable a level higher, in `fp8_linear`.
    """
    operands.check(
        "fp8_matmul",
        out_dtype=out_dtype,
        x=(x_MK, 2, operands.E4M3),
        x_scales=(x_scales, 2, operands.SCALES),
        w=(w_NK, 2, operands.E4M3),
        w_scales=(w_scales, 2, operands.SCALES),
    )
    (M, K), (N, inner) = x_MK.shape, w_NK.shape
    across = num_blocks(K)
    rows = (N, num_blocks(N))
    if (
        inner != K
        or x_scales.shape != (M, across)
        or w_scales.shape not in [(row, across) for row in rows]
    ):
        raise ValueError(
            f"fp8_matmul wants x [M, K], scales [M, ceil(K/128)], w [N, K] and scales "
            f"[N or ceil(N/128), ceil(K/128)]; got {x_MK.shape}, {x_scales.shape}, {w_NK.shape}, "
            f"{w_scales.shape}"
        )
    return select.run(
        "fp8_matmul",
        IMPLEMENTATIONS,
        implementation,
        *(x_MK, x_scales, w_NK, w_scales),
        out_dtype=out_dtype,
    )
