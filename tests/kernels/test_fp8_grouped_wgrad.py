"""The FP8 gradient of grouped matrices on every backend against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chip import interpreted
from pallas_kernels.fp8_grouped_wgrad import IMPLEMENTATIONS, fp8_grouped_wgrad
from tests.kernels import fp8_oracle
from tests.kernels.backends import run, tolerance
from tests.tolerance import TOLERANCE, rel_err

# Name -> (groups, group of each tile, N, K).
LAYOUTS = {
    "an empty group, one of two tiles, one of no group": (4, [0, 0, 2, 3, -1], 64, 192),
    "no tile of any group": (2, [-1], 128, 64),
    "edges": (2, [1, 1, 1], 192, 320),
}


def drawn(seed: int, layout: str):
    groups, tiles, N, K = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    operands, wide = [], []
    for rows in (N, K):
        numbers = rng.standard_normal((rows, 128 * len(tiles)))
        # Tiles differ in scale tenfold, so that a scale in the wrong place is seen.
        numbers *= 10.0 ** rng.uniform(-0.5, 0.5, (rows, len(tiles))).repeat(128, 1)
        quantized = fp8_oracle.quantize(numbers, (1, 128), False)
        operands += map(jnp.asarray, quantized)
        wide.append(fp8_oracle.dequantize(*quantized, (1, 128)))
    exact = np.zeros((groups, N, K))
    for number, group in enumerate(tiles):
        here = slice(number * 128, (number + 1) * 128)
        if group >= 0:
            exact[group] += wide[0][:, here] @ wide[1][:, here].T
    return [*operands, jnp.asarray(tiles, jnp.int32)], groups, exact


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(layout, backend, seed):
    operands, groups, exact = drawn(seed, layout)
    found = run(backend, fp8_grouped_wgrad, *operands, num_groups=groups)
    assert found.dtype == jnp.float32
    for one, other in zip(found, exact, strict=True):
        assert rel_err(one, other) < tolerance(backend)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=[pytest.mark.thorough] * (name in ("gpu", "tpu")))
        for name in IMPLEMENTATIONS
    ],
)
def test_it_is_rounded_once(backend, seed):
    operands, groups, exact = drawn(seed, "edges")
    found = run(backend, fp8_grouped_wgrad, *operands, num_groups=groups, out_dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    # One rounding, and now and then to the other side of a tie for the sum before it.
    assert rel_err(found, exact) < tolerance(backend, jnp.bfloat16) - TOLERANCE["bf16"] / 2


def test_programs_share_the_tiles(seed):
    operands, groups, exact = drawn(seed, "edges")  # six tiles
    with interpreted("gpu", programs=4):
        call = functools.partial(fp8_grouped_wgrad, num_groups=groups, implementation="gpu")
        found = np.asarray(jax.jit(call)(*operands))
    assert rel_err(found, exact) < TOLERANCE["f32"]


@pytest.mark.parametrize("wrong", ["group", "dy scales", "x scales"])
def test_a_wrong_answer_is_seen(wrong, seed):
    (dy, dy_scales, x, x_scales, tiles), groups, exact = drawn(
        seed, "an empty group, one of two tiles, one of no group"
    )
    if wrong == "group":
        tiles = tiles.at[1].set(1)
    elif wrong == "dy scales":
        dy_scales = dy_scales[:, ::-1]
    else:
        x_scales = x_scales[:, ::-1]
    found = fp8_grouped_wgrad(dy, dy_scales, x, x_scales, tiles, groups)
    assert not rel_err(found, exact) < 0.1


def test_no_rows():
    empty, scales = jnp.zeros((64, 0), jnp.float8_e4m3fn), jnp.zeros((64, 0))
    tiles = jnp.zeros(0, jnp.int32)
    dw = fp8_grouped_wgrad(empty, scales, empty, scales, tiles, 3)
    assert dw.shape == (3, 64, 64)
    assert not np.asarray(dw).any()


def test_bad_input_is_refused(seed):
    (*operands, tiles), groups, _ = drawn(seed, "edges")
    with pytest.raises(ValueError, match=r"and groups \[M/128\]; got .*\(2,\)$"):
        fp8_grouped_wgrad(*operands, tiles[:2], groups)
    with pytest.raises(ValueError, match=r"wants dy of float8_e4m3fn .* got float32\("):
        fp8_grouped_wgrad(operands[0].astype(jnp.float32), *operands[1:], tiles, groups)
