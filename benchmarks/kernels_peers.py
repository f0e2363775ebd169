"""Who else does these operations. Each function builds one contender over `sets` sets of inputs.

It raises where the other project is not installed or does not do the shape; the benchmark writes
down why. Signatures: torch 2.10 and later (`torch._scaled_mm`, `torch.nn.functional.scaled_mm`,
`torch._grouped_mm`, `torch._scaled_grouped_mm`), tokamax 0.0.17. torch's calls come one by one from
Python: under some 15 us each, its figures are Python's. Its FP8 products but those of blocks are
given `use_fast_accum`: sums stay in the tensor cores, which is faster and less exact than ours.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Contender(NamedTuple):
    """`turn()` starts the work on every set of inputs once; `wait` of what it gave ends with it."""

    turn: Callable[[], object]
    wait: Callable[[object], object]


def jax_turns(draw: Callable, function: Callable, sets: int) -> Contender:
    inputs = [jax.jit(draw)(key) for key in jax.random.split(jax.random.key(1), sets)]
    every = jax.jit(lambda inputs: [function(*one) for one in inputs]).lower(inputs).compile()
    jax.block_until_ready(every(inputs))
    return Contender(functools.partial(every, inputs), jax.block_until_ready)


def rows_by_rows(x_MK: Array, w_NK: Array) -> Array:
    """x w^T in BF16, as XLA does it: for e4m3 cuBLAS without scales, or XLA's own Triton."""
    over_K = ((1,), (1,)), ((), ())
    return lax.dot_general(x_MK, w_NK, over_K, preferred_element_type=jnp.bfloat16)


def tokamax_grouped(draw: Callable, sets: int) -> Contender:
    """`draw` as for `grouped_matmul`."""
    tokamax, implementation = _tokamax()

    def function(x_MK, w_GKN, sizes_G):
        return tokamax.ragged_dot(x_MK, w_GKN, group_sizes=sizes_G, implementation=implementation)

    return jax_turns(draw, function, sets)


def tokamax_wgrad(draw: Callable, sets: int) -> Contender:
    """`draw` as for `grouped_wgrad`; the result is BF16."""
    tokamax, implementation = _tokamax()
    over_rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])

    def function(dy_MN, x_MK, sizes_G):
        return tokamax.ragged_dot_general(
            dy_MN,
            x_MK,
            group_sizes=sizes_G,
            ragged_dot_dimension_numbers=over_rows,
            implementation=implementation,
        )

    return jax_turns(draw, function, sets)


def _tokamax():
    """tokamax and its Mosaic kernel with the tiles of its own table for V3's gate on an H100.

    What it takes for shapes that no table has is much smaller tiles, and a search of its own goes
    through hundreds of programs to a shape.
    """
    import tokamax
    from absl import flags

    # `tokamax.ops.gpu` has the same names, and wants jax_triton.
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu

    # tokamax looks at its flags when it is first called, and would read our command line for them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    tiles = pallas_mosaic_gpu.Config(
        block_m=128, block_n=64, block_k=128, num_stages=4, split_k=1, grid_tile_width=8
    )
    return tokamax, (pallas_mosaic_gpu.PallasMosaicGpuRaggedDot(config=tiles),)


def torch_scaled(
    M: int, N: int, K: int, scale_shapes: tuple[tuple[int, ...], tuple[int, ...]], sets: int
) -> Contender:
    """FP8 with scales of one: of each tensor, `((), ())`, or of each row, `((M, 1), (1, N))`."""
    import torch

    def step():
        x, w = _e4m3(M, K), _e4m3(N, K)
        scales = [torch.ones(shape, device="cuda") for shape in scale_shapes]
        return lambda: torch._scaled_mm(
            x, w.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _torch_turns(step, sets)


def torch_blocks(M: int, N: int, K: int, sets: int) -> Contender:
    """Our contract: FP8 with scales of 1x128 and 128x128."""
    import torch
    from torch.nn.functional import ScalingType, scaled_mm

    across = -(-K // 128)

    def step():
        x, w = _e4m3(M, K), _e4m3(N, K)
        # As cuBLAS wants them: rows of x last in memory; blocks of w by four along K.
        x_scales = torch.rand(across, M, device="cuda").t()
        w_scales = torch.rand(-(-N // 128), across + -across % 4, device="cuda").t()
        kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        return lambda: scaled_mm(x, w.t(), x_scales, kinds[0], w_scales, kinds[1])

    return _torch_turns(step, sets)


def torch_grouped(G: int, rows: int, N: int, K: int, sets: int) -> Contender:
    import torch

    def step():
        x, w, ends = _bf16(G * rows, K), _bf16(G, N, K), _ends(G, rows)
        return lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    return _torch_turns(step, sets)


def torch_grouped_rows(G: int, rows: int, N: int, K: int, sets: int) -> Contender:
    """FP8 with a scale to each row of x and of each w."""
    import torch

    def step():
        x, w, ends = _e4m3(G * rows, K), _e4m3(G, N, K), _ends(G, rows)
        scales = torch.ones(G * rows, device="cuda"), torch.ones(G, N, device="cuda")
        return lambda: torch._scaled_grouped_mm(
            x,
            w.transpose(1, 2),
            *scales,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return _torch_turns(step, sets)


def torch_wgrad(G: int, rows: int, N: int, K: int, sets: int) -> Contender:
    """dy^T x of each group, [G, N, K] in BF16."""
    import torch

    def step():
        dy, x, ends = _bf16(G * rows, N), _bf16(G * rows, K), _ends(G, rows)
        return lambda: torch._grouped_mm(dy.t(), x, offs=ends)

    return _torch_turns(step, sets)


def torch_wgrad_rows(G: int, rows: int, N: int, K: int, sets: int) -> Contender:
    """The same in FP8, of operands that lie transposed, with a scale to each row in each group."""
    import torch

    def step():
        dy, x, ends = _e4m3(N, G * rows), _e4m3(K, G * rows), _ends(G, rows)
        scales = torch.ones(G * N, device="cuda"), torch.ones(G * K, device="cuda")
        return lambda: torch._scaled_grouped_mm(
            dy, x.t(), *scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _torch_turns(step, sets)


def _torch_turns(step: Callable[[], Callable], sets: int) -> Contender:
    import torch

    steps = [step() for _ in range(sets)]

    def turn():
        for one in steps:
            one()

    def wait(_):
        torch.cuda.synchronize()

    wait(turn())
    return Contender(turn, wait)


def _bf16(*shape: int):
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _e4m3(*shape: int):
    import torch

    return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)


def _ends(G: int, rows: int):
    """Where each group ends."""
    import torch

    return torch.arange(rows, G * rows + 1, rows, device="cuda", dtype=torch.int32)
