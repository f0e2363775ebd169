"""Times the FP8 kernels on a Hopper GPU against what the chip can do, and against others.

    python benchmarks/kernels.py                       (one family: dense; one shape: --only "V3 o")

The limit is the larger of FLOPs over the chip's dense FP8 rate and bytes over its memory bandwidth,
both of the data sheet (`dsjax/plan/chips.py`); every operand and result counts once. Each result is
checked before it is timed, and what is wrong is not timed. Inputs are random normal numbers, never
zeros, which need less power and so run faster; several sets of them take turns, so that a cache
does not hold them. All contenders of a shape are compiled first and then take turns, medians
count. Others run where they can be imported: XLA's BF16 product; torch's FP8 products with a scale
to a row (less work than ours) and to a block (the same), its BF16 grouped product.
"""

import argparse
import functools
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsjax.plan.chips import BY_KIND, Chip
from pallas_kernels import chip, quantize, select
from pallas_kernels.fp8_grouped_linear import quantize_matrices
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul
from pallas_kernels.fp8_grouped_matmul.shapes import CONTIGUOUS
from pallas_kernels.fp8_grouped_wgrad import fp8_grouped_wgrad
from pallas_kernels.fp8_masked_matmul import fp8_masked_matmul
from pallas_kernels.fp8_masked_matmul.shapes import MASKED
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.shapes import DENSE
from pallas_kernels.quantize.shapes import ACTIVATIONS, SWIGLU

BF16, F32 = jnp.bfloat16, jnp.float32
# A BF16 result is off by its own rounding; tensor cores keep some 14 bits of a sum of 128 products.
BF16_ERROR, F32_ERROR = 2.0**-8, 2.0**-10
# The sets of inputs together are larger than any cache of the chip.
CACHE, MOST_SETS = 128e6, 16
# One turn of a contender, so that starting and waiting do not count.
TURN_S = 0.03


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
    # Name -> (draw, function) of jax, or -> a builder of torch's.
    others: dict[str, tuple[Callable, Callable]]
    torch: dict[str, Callable[[int], Callable[[], None]]]


def limit(flops: float, num_bytes: float, here: Chip) -> tuple[float, str]:
    """Seconds below which the chip cannot go, and what is in the way."""
    compute, memory = flops / here.fp8_flops, num_bytes / here.hbm_bandwidth
    return (compute, "compute") if compute > memory else (memory, "memory")


def product_bytes(M: int, N: int, K: int, *, groups: int = 1, out: int = 2) -> float:
    """Of FP8 operands [M, K] and [groups, N, K], their scales, and a result [M, N]."""
    scales = M * math.ceil(K / 128) + groups * math.ceil(N / 128) * math.ceil(K / 128)
    return M * K + groups * N * K + out * M * N + 4 * scales


def _normal(key: Array, *shape: int) -> Array:
    return jax.random.normal(key, shape, BF16)


def dense() -> Iterator[Case]:
    def case(name, M, N, K):
        def draw(key):
            x, w = (_normal(k, n, K) for k, n in zip(jax.random.split(key), (M, N), strict=True))
            return *quantize.quantize_rows(x), *quantize.quantize_blocks(w)

        def draw_bf16(key):
            return tuple(
                _normal(k, n, K) for k, n in zip(jax.random.split(key), (M, N), strict=True)
            )

        return Case(
            f"{name} {M}x{N}x{K}",
            flops=2 * M * N * K,
            num_bytes=product_bytes(M, N, K),
            draw=draw,
            ours=functools.partial(fp8_matmul, implementation="gpu"),
            oracle=lambda *a: fp8_matmul(*a, implementation="dequantize", out_dtype=F32),
            error=BF16_ERROR,
            others={"XLA BF16": (draw_bf16, lambda x, w: x @ w.T)},
            torch={
                "torch FP8, scale to a row": lambda sets: torch_rows(M, N, K, sets),
                "torch FP8, scale to a block": lambda sets: torch_blocks(M, N, K, sets),
            },
        )

    return (case(name, *shape) for name, shape in DENSE.items())


def quantizers() -> Iterator[Case]:
    def case(name, function, shape, bytes_of_one, outputs):
        oracle = functools.partial(function, implementation="reference")
        return Case(
            f"{function.__name__} {name} {shape[0]}x{shape[1]}",
            flops=0,
            num_bytes=bytes_of_one * shape[0] * outputs,
            draw=lambda key: (_normal(key, *shape),),
            ours=functools.partial(function, implementation="gpu"),
            oracle=oracle,
            error=0 if function is not quantize.swiglu_quantize else 1e-3,
            others={"XLA": (lambda key: (_normal(key, *shape),), oracle)},
            torch={},
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
            x, w = jax.random.split(key)
            w = quantize_matrices(_normal(w, G, N, K))
            return *quantize.quantize_rows(_normal(x, G * rows, K)), *w, tile_groups

        return Case(
            f"{name} {G}x{rows}, {N}x{K}",
            flops=2 * G * rows * N * K,
            num_bytes=product_bytes(G * rows, N, K, groups=G),
            draw=draw,
            ours=functools.partial(fp8_grouped_matmul, implementation="gpu"),
            oracle=lambda *a: fp8_grouped_matmul(*a, implementation="dequantize", out_dtype=F32),
            error=BF16_ERROR,
            others={},
            torch={"torch BF16": lambda sets: torch_grouped(G, rows, N, K, sets)},
        )

    return (case(name, *shape) for name, shape in CONTIGUOUS.items())


def masked() -> Iterator[Case]:
    def case(name, G, places, used, N, K):
        sizes_G = jnp.full(G, used, jnp.int32)

        def draw(key):
            x, w = jax.random.split(key)
            x, scales = quantize.quantize_rows(_normal(x, G * places, K))
            x = x.reshape(G, places, K), scales.reshape(G, places, -1)
            return *x, *quantize_matrices(_normal(w, G, N, K)), sizes_G

        return Case(
            f"{name}, {used} of {G}x{places}, {N}x{K}",
            flops=2 * G * used * N * K,
            # Places that no row takes are not read, and their zeros are written.
            num_bytes=product_bytes(G * used, N, K, groups=G) + 2 * G * (places - used) * N,
            draw=draw,
            ours=functools.partial(fp8_masked_matmul, implementation="gpu"),
            oracle=lambda *a: fp8_masked_matmul(*a, implementation="dequantize", out_dtype=F32),
            error=BF16_ERROR,
            others={},
            torch={"torch BF16": lambda sets: torch_grouped(G, used, N, K, sets)},
        )

    return (case(name, *shape) for name, shape in MASKED.items())


def wgrad() -> Iterator[Case]:
    def case(name, G, rows, N, K):
        M, tile_groups = G * rows, jnp.arange(G, dtype=jnp.int32).repeat(rows // 128)

        def draw(key):
            dy, x = (
                quantize.quantize_columns(_normal(k, M, n))
                for k, n in zip(jax.random.split(key), (N, K), strict=True)
            )
            return *dy, *x, tile_groups

        return Case(
            f"{name} {G}x{rows}, {N}x{K}",
            flops=2 * M * N * K,
            num_bytes=(M + 4 * M / 128) * (N + K) + 4 * G * N * K,
            draw=draw,
            ours=lambda *a: fp8_grouped_wgrad(*a, G, implementation="gpu"),
            oracle=lambda *a: fp8_grouped_wgrad(*a, G, implementation="dequantize"),
            error=F32_ERROR,
            others={},
            torch={},
        )

    return (case(name, *shape) for name, shape in CONTIGUOUS.items())


FAMILIES = {
    "dense": dense,
    "quantizers": quantizers,
    "grouped": grouped,
    "masked": masked,
    "wgrad": wgrad,
}


def _torch_e4m3(*shape: int):
    import torch

    return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)


def _torch_turns(steps: list[Callable]) -> Callable[[], None]:
    import torch

    def turn():
        for step in steps:
            step()

    turn()
    torch.cuda.synchronize()
    return turn


def torch_rows(M: int, N: int, K: int, sets: int) -> Callable[[], None]:
    import torch

    def step():
        x, w = _torch_e4m3(M, K), _torch_e4m3(N, K)
        scales = torch.rand(M, 1, device="cuda"), torch.rand(1, N, device="cuda")
        return lambda: torch._scaled_mm(x, w.t(), *scales, out_dtype=torch.bfloat16)

    return _torch_turns([step() for _ in range(sets)])


def torch_blocks(M: int, N: int, K: int, sets: int) -> Callable[[], None]:
    import torch
    from torch.nn.functional import ScalingType, scaled_mm

    across = -(-K // 128)

    def step():
        x, w = _torch_e4m3(M, K), _torch_e4m3(N, K)
        # As cuBLAS wants them: rows of x last in memory; blocks of w by four along K.
        x_scales = torch.rand(across, M, device="cuda").t()
        w_scales = torch.rand(-(-N // 128), across + -across % 4, device="cuda").t()
        kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        return lambda: scaled_mm(x, w.t(), x_scales, kinds[0], w_scales, kinds[1])

    return _torch_turns([step() for _ in range(sets)])


def torch_grouped(G: int, rows: int, N: int, K: int, sets: int) -> Callable[[], None]:
    import torch

    def step():
        x = torch.randn(G * rows, K, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(G, N, K, device="cuda", dtype=torch.bfloat16)
        ends = torch.arange(rows, G * rows + 1, rows, device="cuda", dtype=torch.int32)
        return lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    return _torch_turns([step() for _ in range(sets)])


def wrong(case: Case) -> str | None:
    """What is wrong with the result of ours, or None."""
    inputs = jax.jit(case.draw)(jax.random.key(0))
    found, expected = (jax.jit(function)(*inputs) for function in (case.ours, case.oracle))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = one.astype(F32), other.astype(F32)
        error = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
        if not error <= case.error:
            return f"error {error:.2e}, allowed are {case.error:.2e}"
    return None


def jax_turn(draw: Callable, function: Callable, sets: int) -> Callable[[], object]:
    inputs = [jax.jit(draw)(key) for key in jax.random.split(jax.random.key(1), sets)]
    every = jax.jit(lambda inputs: [function(*one) for one in inputs]).lower(inputs).compile()
    jax.block_until_ready(every(inputs))
    return lambda: every(inputs)


def wait(result: object) -> None:
    jax.block_until_ready(result)
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()


def timed(turns: dict[str, Callable], sets: int, rounds: int, floor_s: float) -> dict[str, float]:
    """Median seconds of one call; each turn runs every set several times."""
    repeats = max(1, math.ceil(TURN_S / (sets * floor_s)))
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            began, result = time.perf_counter(), None
            for _ in range(repeats):
                result = turn()
            wait(result)
            seconds[name].append((time.perf_counter() - began) / (repeats * sets))
    return {name: statistics.median(times) for name, times in seconds.items()}


def clocks() -> str:
    query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no clocks: {error}"


def report(case: Case, here: Chip, rounds: int) -> bool:
    """Prints the rows of one shape; whether ours was right."""
    floor_s, bound = limit(case.flops, case.num_bytes, here)
    print(f"{case.name}: limit {floor_s * 1e6:.1f} us ({bound}); {clocks()}", flush=True)
    if fault := wrong(case):
        print(f"  ours: WRONG, {fault}", flush=True)
        return False
    sets = min(MOST_SETS, max(2, math.ceil(CACHE / case.num_bytes)))
    turns = {"ours": jax_turn(case.draw, case.ours, sets)}
    for name, (draw, function) in case.others.items():
        turns[name] = jax_turn(draw, function, sets)
    for name, build in case.torch.items() if importlib.util.find_spec("torch") else ():
        try:
            turns[name] = build(sets)
        except Exception as error:  # another project's: its reason is the result
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    for name, second in timed(turns, sets, rounds, floor_s).items():
        rate = f"{case.flops / second / 1e12:7.0f} TFLOP/s" if case.flops else ""
        print(
            f"  {name:28} {second * 1e6:9.1f} us {rate} {case.num_bytes / second / 1e12:5.2f} TB/s "
            f"{floor_s / second:5.0%} of the limit",
            flush=True,
        )
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="FP8 kernels on a Hopper GPU, against its limits")
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; without any: all")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    options = parser.parse_args(arguments)
    if unknown := set(options.family) - set(FAMILIES):
        parser.error(f"family {sorted(unknown)}; there are {', '.join(FAMILIES)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory, too
    try:
        chip.needs_hopper("benchmarks")
    except select.Unsupported as reason:
        print(f"{reason}; `make aot` compiles the kernels without one", file=sys.stderr)
        return 2
    here = BY_KIND.get(chip.chip().kind)
    if here is None:
        print(f"no limits of {chip.chip().kind!r} in dsjax/plan/chips.py", file=sys.stderr)
        return 2
    print(f"jax {jax.__version__}, {chip.chip().kind}; command: {' '.join(sys.argv)}\n")
    cases = [one for name in options.family or FAMILIES for one in FAMILIES[name]()]
    right = [report(case, here, options.rounds) for case in cases if options.only in case.name]
    if not right:
        print(f"--only {options.only!r}: no case has that in its name", file=sys.stderr)
    return 0 if right and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
