"""What is timed: every operation at DeepSeek's shapes, its goals, and who else does it.

The goals are this project's, for one H200. The one against unscaled FP8 is the one that a chip with
lower clocks cannot miss or meet by them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kernels_peers as peers
from jax import Array
from kernels_peers import Contender

from pallas_kernels import quantize
from pallas_kernels.fp8_grouped_linear import quantize_matrices
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul
from pallas_kernels.fp8_grouped_matmul.shapes import CONTIGUOUS
from pallas_kernels.fp8_grouped_wgrad import fp8_grouped_wgrad
from pallas_kernels.fp8_masked_matmul import fp8_masked_matmul
from pallas_kernels.fp8_masked_matmul.shapes import MASKED
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.shapes import DENSE
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_wgrad
from pallas_kernels.quantize.shapes import ACTIVATIONS, SWIGLU

BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
# A BF16 result is off by its own rounding; tensor cores keep some 14 bits of a sum of 128 products.
BF16_ERROR, F32_ERROR = 2.0**-8, 2.0**-10
# cuBLAS without scales, by two ways; XLA may choose a Triton program of its own.
UNSCALED = ("XLA FP8, unscaled", "torch FP8, unscaled")


class Goal(NamedTuple):
    """At least so many TFLOP/s or TB/s; or so many times the rate of the fastest of some others."""

    least: float
    unit: str = "TFLOP/s"
    of: tuple[str, ...] = ()


class Case(NamedTuple):
    """One shape of one operation. `draw(key)` gives the arguments of `ours` and of `oracle`."""

    name: str
    flops: float
    num_bytes: float
    draw: Callable[[Array], tuple]
    ours: Callable
    oracle: Callable
    # What may lie between them, in the Frobenius norm; 0 is equal to the bit.
    error: float
    # Name -> builder, given how many sets of inputs take turns.
    peers: dict[str, Callable[[int], Contender]]
    goals: tuple[Goal, ...] = ()
    # Whose rate of the chip is the limit.
    peak: str = "fp8_flops"


def product_bytes(M: int, N: int, K: int, *, groups: int = 1, out: int = 2) -> float:
    """Of FP8 operands [M, K] and [groups, N, K], their scales, and a result [M, N]."""
    scales = M * math.ceil(K / 128) + groups * math.ceil(N / 128) * math.ceil(K / 128)
    return M * K + groups * N * K + out * M * N + 4 * scales


def _normals(key: Array, *shapes: tuple[int, ...], dtype=BF16) -> tuple[Array, ...]:
    keys = jax.random.split(key, len(shapes))
    drawn = (jax.random.normal(k, shape, BF16) for k, shape in zip(keys, shapes, strict=True))
    return tuple(one.astype(dtype) for one in drawn)


def dense() -> Iterator[Case]:
    # Few rows are bound by memory, and their goal is a rate of bytes.
    few = {64: Goal(3.4, "TB/s"), 128: Goal(3.3, "TB/s")}

    def case(name, M, N, K):
        def draw(key):
            x, w = _normals(key, (M, K), (N, K))
            return *quantize.quantize_rows(x), *quantize.quantize_blocks(w)

        def xla(dtype):
            draw = functools.partial(_normals, dtype=dtype)
            return functools.partial(
                peers.jax_turns, lambda key: draw(key, (M, K), (N, K)), peers.rows_by_rows
            )

        def torch(*scale_shapes):
            return functools.partial(peers.torch_scaled, M, N, K, scale_shapes)

        return Case(
            f"{name} {M}x{N}x{K}",
            flops=2 * M * N * K,
            num_bytes=product_bytes(M, N, K),
            draw=draw,
            ours=functools.partial(fp8_matmul, implementation="gpu"),
            oracle=lambda *a: fp8_matmul(*a, implementation="dequantize", out_dtype=F32),
            error=BF16_ERROR,
            peers={
                "XLA BF16": xla(BF16),
                UNSCALED[0]: xla(E4M3),
                UNSCALED[1]: torch((), ()),
                "torch FP8, scale to a row": torch((M, 1), (1, N)),
                "torch FP8, scale to a block": functools.partial(peers.torch_blocks, M, N, K),
            },
            goals=(few.get(M, Goal(1250)), Goal(0.95, of=UNSCALED)),
        )

    return (case(name, *shape) for name, shape in DENSE.items())


def quantizers() -> Iterator[Case]:
    def case(name, function, shape, bytes_of_one, outputs):
        def draw(key):
            return _normals(key, shape)

        oracle = functools.partial(function, implementation="reference")
        return Case(
            f"{function.__name__} {name} {shape[0]}x{shape[1]}",
            flops=0,
            num_bytes=bytes_of_one * shape[0] * outputs,
            draw=draw,
            ours=functools.partial(function, implementation="gpu"),
            oracle=oracle,
            error=0 if function is not quantize.swiglu_quantize else 1e-3,
            peers={"XLA": functools.partial(peers.jax_turns, draw, oracle)},
            goals=(Goal(3.7, "TB/s"),),
        )

    # BF16 in, e4m3 and a 128th of FP32 out, once or twice.
    for name, shape in ACTIVATIONS.items():
        yield case(name, quantize.quantize_rows, shape, 3 + 4 / 128, shape[1])
        yield case(name, quantize.quantize_rows_and_columns, shape, 4 + 8 / 128, shape[1])
    for name, shape in SWIGLU.items():
        yield case(name, quantize.swiglu_quantize, shape, 5 + 4 / 128, shape[1] // 2)


def grouped() -> Iterator[Case]:
    def case(name, G, rows, N, K):
        tile_groups = jnp.arange(G, dtype=jnp.int32).repeat(rows // 128)

        def draw(key):
            x, w = _normals(key, (G * rows, K), (G, N, K))
            return *quantize.quantize_rows(x), *quantize_matrices(w), tile_groups

        return Case(
            f"{name} {G}x{rows}, {N}x{K}",
            flops=2 * G * rows * N * K,
            num_bytes=product_bytes(G * rows, N, K, groups=G),
            draw=draw,
            ours=functools.partial(fp8_grouped_matmul, implementation="gpu"),
            oracle=lambda *a: fp8_grouped_matmul(*a, implementation="dequantize", out_dtype=F32),
            error=BF16_ERROR,
            peers=_torch_grouped(G, rows, N, K),
            goals=(Goal(1000 if name.startswith("V2-Lite") else 1100),),
        )

    return (case(name, *shape) for name, shape in CONTIGUOUS.items())


def _torch_grouped(G: int, rows: int, N: int, K: int) -> dict[str, Callable[[int], Contender]]:
    shape = G, rows, N, K
    return {
        "torch BF16": functools.partial(peers.torch_grouped, *shape),
        "torch FP8, scale to a row": functools.partial(peers.torch_grouped_rows, *shape),
    }


def grouped_bf16() -> Iterator[Case]:
    def case(name, G, rows, N, K):
        sizes_G = jnp.full(G, rows, jnp.int32)

        def draw(key):
            return *_normals(key, (G * rows, K), (G, K, N)), sizes_G

        return Case(
            f"BF16 {name} {G}x{rows}, {N}x{K}",
            flops=2 * G * rows * N * K,
            num_bytes=2 * (G * rows * (N + K) + G * N * K),
            draw=draw,
            ours=functools.partial(grouped_matmul, implementation="gpu"),
            oracle=lambda x, w, sizes: grouped_matmul(
                x.astype(F32), w.astype(F32), sizes, implementation="blocks"
            ),
            error=BF16_ERROR,
            peers={
                "torch BF16": functools.partial(peers.torch_grouped, G, rows, N, K),
                "tokamax BF16": functools.partial(peers.tokamax_grouped, draw),
            },
            peak="bf16_flops",
        )

    return (case(name, *shape) for name, shape in CONTIGUOUS.items())


def masked() -> Iterator[Case]:
    # Of V3's shapes, TFLOP/s by N and by how many rows there are.
    goals = {(4096, 1024): 1050, (4096, 512): 950, (4096, 256): 850}

    def case(name, G, places, used, N, K):
        sizes_G = jnp.full(G, used, jnp.int32)

        def draw(key):
            x, w = _normals(key, (G * places, K), (G, N, K))
            x, scales = quantize.quantize_rows(x)
            x = x.reshape(G, places, K), scales.reshape(G, places, -1)
            return *x, *quantize_matrices(w), sizes_G

        few = used < 128
        return Case(
            f"{name}, {used} of {G}x{places}, {N}x{K}",
            flops=2 * G * used * N * K,
            # Places that no row takes are not read, and their zeros are written.
            num_bytes=product_bytes(G * used, N, K, groups=G) + 2 * G * (places - used) * N,
            draw=draw,
            ours=functools.partial(fp8_masked_matmul, implementation="gpu"),
            oracle=lambda *a: fp8_masked_matmul(*a, implementation="dequantize", out_dtype=F32),
            error=BF16_ERROR,
            # Theirs have no places that are not used.
            peers=_torch_grouped(G, used, N, K),
            goals=(Goal(3.2, "TB/s") if few else Goal(goals.get((N, used), 800)),),
        )

    return (case(name, *shape) for name, shape in MASKED.items())


def wgrad() -> Iterator[Case]:
    def case(name, G, rows, N, K):
        M, tile_groups = G * rows, jnp.arange(G, dtype=jnp.int32).repeat(rows // 128)

        def draw(key):
            dy, x = map(quantize.quantize_columns, _normals(key, (M, N), (M, K)))
            return *dy, *x, tile_groups

        return Case(
            f"{name} {G}x{rows}, {N}x{K}",
            flops=2 * M * N * K,
            num_bytes=(M + 4 * M / 128) * (N + K) + 4 * G * N * K,
            draw=draw,
            ours=lambda *a: fp8_grouped_wgrad(*a, G, implementation="gpu"),
            oracle=lambda *a: fp8_grouped_wgrad(*a, G, implementation="dequantize"),
            error=F32_ERROR,
            # Theirs write half the bytes: BF16, where ours are FP32.
            peers={
                "torch BF16 to BF16": functools.partial(peers.torch_wgrad, G, rows, N, K),
                "torch FP8, by row, to BF16": functools.partial(
                    peers.torch_wgrad_rows, G, rows, N, K
                ),
            },
            goals=(Goal(800),),
        )

    return (case(name, *shape) for name, shape in CONTIGUOUS.items())


def wgrad_bf16() -> Iterator[Case]:
    def case(name, G, rows, N, K):
        M, sizes_G = G * rows, jnp.full(G, rows, jnp.int32)

        def draw(key):
            return *_normals(key, (M, N), (M, K)), sizes_G

        return Case(
            f"BF16 {name} {G}x{rows}, {N}x{K}",
            flops=2 * M * N * K,
            num_bytes=2 * (M * (N + K) + G * N * K),
            draw=draw,
            ours=functools.partial(grouped_wgrad, out_dtype=BF16, implementation="gpu"),
            oracle=lambda *a: grouped_wgrad(*a, implementation="blocks"),
            error=BF16_ERROR,
            peers={
                "torch BF16": functools.partial(peers.torch_wgrad, G, rows, N, K),
                "tokamax BF16": functools.partial(peers.tokamax_wgrad, draw),
            },
            goals=(Goal(650),),
            peak="bf16_flops",
        )

    return (case(name, *shape) for name, shape in CONTIGUOUS.items())


FAMILIES = {
    "dense": dense,
    "quantizers": quantizers,
    "grouped": grouped,
    "grouped_bf16": grouped_bf16,
    "masked": masked,
    "wgrad": wgrad,
    "wgrad_bf16": wgrad_bf16,
}
