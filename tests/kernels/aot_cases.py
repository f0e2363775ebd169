"""What is compiled ahead of time: kernels at sizes of real models, by platform.

Name -> (function, then shape and dtype of each argument).
"""

import functools
from collections.abc import Iterable

import jax.numpy as jnp

from pallas_kernels import quantize
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul
from pallas_kernels.fp8_grouped_matmul.shapes import CONTIGUOUS
from pallas_kernels.fp8_grouped_wgrad import fp8_grouped_wgrad
from pallas_kernels.fp8_masked_matmul import fp8_masked_matmul
from pallas_kernels.fp8_masked_matmul.shapes import MASKED
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.shapes import DENSE
from pallas_kernels.grouped_matmul import gpu, grouped_matmul, grouped_wgrad
from pallas_kernels.grouped_matmul.shapes import SORTED
from pallas_kernels.masked_matmul import masked_matmul
from pallas_kernels.quantize.shapes import ACTIVATIONS, SWIGLU, WEIGHTS

BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn


def _quantizers(platform: str) -> dict:
    wide, *others = ACTIVATIONS.values()
    cases = [
        *((quantize.quantize_rows, shape, BF16, False) for shape in ACTIVATIONS.values()),
        (quantize.quantize_rows, wide, F32, True),
        (quantize.quantize_columns, wide, BF16, False),
        (quantize.quantize_rows_and_columns, wide, BF16, False),
        (quantize.quantize_rows_and_columns, wide, F32, True),
        *((quantize.quantize_rows_and_columns, shape, BF16, False) for shape in others),
        *((quantize.quantize_blocks, shape, F32, False) for shape in WEIGHTS.values()),
        (quantize.quantize_blocks, wide, BF16, True),
        *((quantize.swiglu_quantize, shape, BF16, False) for shape in SWIGLU.values()),
    ]
    return {
        f"{function.__name__} {'x'.join(map(str, shape))} {dtype.__name__}": (
            functools.partial(function, power_of_two=power_of_two, implementation=platform),
            (shape, dtype),
        )
        for function, shape, dtype, power_of_two in cases
    }


def _matmul(M: int, N: int, K: int, out_dtype, platform: str, *, by_column: bool = False) -> tuple:
    rows = N if by_column else -(-N // 128)
    return (
        functools.partial(fp8_matmul, out_dtype=out_dtype, implementation=platform),
        ((M, K), E4M3),
        ((M, -(-K // 128)), F32),
        ((N, K), E4M3),
        ((rows, -(-K // 128)), F32),
    )


def _matmuls(platform: str) -> dict:
    return {
        **{
            f"fp8_matmul {'x'.join(map(str, shape))}": _matmul(*shape, BF16, platform)
            for shape in DENSE.values()
        },
        "fp8_matmul 3x576x7168": _matmul(3, 576, 7168, BF16, platform),
        "fp8_matmul 4096x7168x2048 float32": _matmul(4096, 7168, 2048, F32, platform),
        "fp8_matmul 7168x2048x4096 float32, scales by column": _matmul(
            7168, 2048, 4096, F32, platform, by_column=True
        ),
    }


def _grouped(platform: str, shapes: Iterable = tuple(CONTIGUOUS.values())) -> dict:
    return {
        f"fp8_grouped_matmul {G}x{rows}, {N}x{K}": (
            functools.partial(fp8_grouped_matmul, implementation=platform),
            ((G * rows, K), E4M3),
            ((G * rows, -(-K // 128)), F32),
            ((G, N, K), E4M3),
            ((G, -(-N // 128), -(-K // 128)), F32),
            ((G * rows // 128,), jnp.int32),
        )
        for G, rows, N, K in shapes
    }


def _input_gradients(platform: str) -> dict:
    """The products of a layer's input's gradient: N and K change places."""
    dense = {(M, K, N) for M, N, K in DENSE.values()} - set(DENSE.values())
    return {
        f"fp8_matmul {'x'.join(map(str, shape))}": _matmul(*shape, BF16, platform)
        for shape in sorted(dense)
    } | _grouped(platform, [(G, rows, K, N) for G, rows, N, K in CONTIGUOUS.values()])


def _masked(platform: str) -> dict:
    return {
        f"fp8_masked_matmul {G}x{places}, {N}x{K}": (
            functools.partial(fp8_masked_matmul, implementation=platform),
            ((G, places, K), E4M3),
            ((G, places, -(-K // 128)), F32),
            ((G, N, K), E4M3),
            ((G, -(-N // 128), -(-K // 128)), F32),
            ((G,), jnp.int32),
        )
        for G, places, _, N, K in MASKED.values()
    }


def _wgrads(platform: str) -> dict:
    return {
        f"fp8_grouped_wgrad {G}x{rows}, {N}x{K} {out_dtype.__name__}": (
            functools.partial(
                fp8_grouped_wgrad, num_groups=G, out_dtype=out_dtype, implementation=platform
            ),
            ((N, G * rows), E4M3),
            ((N, G * rows // 128), F32),
            ((K, G * rows), E4M3),
            ((K, G * rows // 128), F32),
            ((G * rows // 128,), jnp.int32),
        )
        for (G, rows, N, K), out_dtype in zip(CONTIGUOUS.values(), (F32, BF16) * 2, strict=True)
    }


def _bf16_groups() -> dict:
    """Grouped products of BF16: forward, gradient of the rows, gradient of the matrices."""
    cases, how = {}, {"implementation": "gpu"}
    for G, M, K, N in SORTED.values():
        x, dy, w, sizes = ((M, K), BF16), ((M, N), BF16), ((G, K, N), BF16), ((G,), jnp.int32)
        forward = functools.partial(grouped_matmul, **how)
        backward = functools.partial(gpu.rows_times_matrix, contract=1)
        cases[f"grouped_matmul {G}, {M}x{K}x{N}"] = forward, x, w, sizes
        cases[f"grouped_matmul {G}, {M}x{N}x{K} turned"] = backward, dy, w, sizes
        for dtype in (BF16, F32):
            wgrad = functools.partial(grouped_wgrad, out_dtype=dtype, **how)
            cases[f"grouped_wgrad {G}, {M}x{K}x{N} {dtype.__name__}"] = wgrad, x, dy, sizes
    for G, places, _, N, K in MASKED.values():
        x, w = ((G, places, K), BF16), ((G, K, N), BF16)
        cases[f"masked_matmul {G}x{places}, {K}x{N}"] = (
            functools.partial(masked_matmul, **how),
            *(x, w, ((G,), jnp.int32)),
        )
    return cases


def _wide(platform: str) -> dict:
    return {
        f"fp8_matmul_wide {'x'.join(map(str, shape))}": _matmul(*shape, BF16, f"{platform}_wide")
        for shape in DENSE.values()
    }


GPU, TPU = (
    _quantizers(platform)
    | _matmuls(platform)
    | _grouped(platform)
    | _masked(platform)
    | _wgrads(platform)
    for platform in ("gpu", "tpu")
)
GPU |= _input_gradients("gpu") | _bf16_groups()
# 447 tiles, as sorted rows have them: bands of eight leave a lower one over.
GPU |= _grouped("gpu", [(3, 19072, 2048, 1408)])

# For chips whose matrix unit takes e4m3.
TPU7 = _wide("tpu")

# One of each, the quickest to compile.
FEW = (
    "quantize_rows 8192x2048 bfloat16",
    "quantize_columns 8192x2048 bfloat16",
    "quantize_rows_and_columns 8192x2048 bfloat16",
    "quantize_blocks 576x7168 float32",
    "swiglu_quantize 49152x2816 bfloat16",
    "fp8_matmul 64x7168x16384",
    "fp8_matmul_wide 64x7168x16384",
    "fp8_grouped_matmul 64x768, 2048x1408",
    "fp8_masked_matmul 64x128, 2816x2048",
    "fp8_grouped_wgrad 64x768, 2048x1408 bfloat16",
    "grouped_matmul 64, 49152x2048x1408",
    "grouped_matmul 64, 49152x1408x2048 turned",
    "grouped_wgrad 64, 49152x2048x1408 float32",
    "masked_matmul 64x128, 2048x2816",
)
