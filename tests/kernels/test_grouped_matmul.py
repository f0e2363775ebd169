"""Every implementation of the grouped product against NumPy float64, values and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, WGRADS, grouped_matmul, grouped_wgrad
from tests.tolerance import TOLERANCE, rel_err

# Name -> (rows, K, N, group sizes); rows beyond the sum belong to no group.
SHAPES = {
    "even": (32, 8, 16, [8, 8, 8, 8]),
    "empty groups": (24, 5, 7, [0, 9, 0, 0, 15, 0]),
    "one huge group": (300, 3, 5, [1, 298, 1]),
    "all in the last": (40, 4, 4, [0, 0, 40]),
    "rows behind": (50, 6, 3, [7, 0, 20]),
    "no row in any group": (16, 4, 4, [0, 0]),
    "odd sizes": (37, 13, 11, [3, 17, 1, 9, 7]),
    "one group": (19, 2, 3, [19]),
    "one row": (1, 3, 2, [0, 1, 0]),
    "no rows": (0, 3, 2, [0, 0]),
}
NAMES = [*IMPLEMENTATIONS, None]


def drawn(shape: str, seed: int):
    rows, inner, outer, sizes = SHAPES[shape]
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((rows, inner)), rng.standard_normal((len(sizes), inner, outer))
    return x, w, np.array(sizes, np.int32), rng.standard_normal((rows, outer))


def plain(x: np.ndarray, w: np.ndarray, sizes: np.ndarray, grad: np.ndarray):
    """Value, gradient of x, gradient of w: one matrix product per group."""
    y, grad_x, grad_w = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(sizes):
        mine = slice(start, start + size)
        y[mine] = x[mine] @ w[group]
        grad_x[mine] = grad[mine] @ w[group].T
        grad_w[group] = x[mine].T @ grad[mine]
        start += size
    return y, grad_x, grad_w


def ours(name: str | None, x, w, sizes, grad, dtype):
    x, w, grad = (jnp.asarray(a, dtype) for a in (x, w, grad))
    sizes = jnp.asarray(sizes)

    @jax.jit
    def run(x, w, grad):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=name), x, w)
        return y, *back(grad)

    return run(x, w, grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(name, shape, seed):
    inputs = drawn(shape, seed)
    found = ours(name, *inputs, jnp.float32)
    for one, exact, what in zip(found, plain(*inputs), ["y", "grad x", "grad w"], strict=True):
        assert one.dtype == jnp.float32
        assert rel_err(one, exact) < TOLERANCE["f32"], what


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float64_is_kept(name, seed):
    inputs = drawn("odd sizes", seed)
    with jax.enable_x64(True):
        found = ours(name, *inputs, jnp.float64)
    for one, exact in zip(found, plain(*inputs), strict=True):
        assert rel_err(one, exact) < TOLERANCE["f64"]


@pytest.mark.parametrize("name", ["blocks", "ragged_dot"])
def test_bfloat16_is_summed_in_float32(name, seed):
    rng = np.random.default_rng(seed)
    sizes = np.array([300, 0, 212], np.int32)
    inputs = rng.standard_normal((512, 64)), rng.standard_normal((3, 64, 8)), sizes
    inputs = (*inputs, rng.standard_normal((512, 8)))
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in inputs]
    rounded[2] = sizes
    for one, exact in zip(ours(name, *inputs, jnp.bfloat16), plain(*rounded), strict=True):
        assert one.dtype == jnp.bfloat16
        assert rel_err(one, exact) < TOLERANCE["bf16"] / 2


@pytest.mark.parametrize("name", [*WGRADS, None])
@pytest.mark.parametrize("shape", ["odd sizes", "rows behind", "one huge group"])
def test_weight_gradient_alone(name, shape, seed):
    x, w, sizes, grad = drawn(shape, seed)
    short = jnp.asarray(grad, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16)
    call = jax.jit(lambda *a: grouped_wgrad(*a, implementation=name))
    found = call(*(one.astype(jnp.float32) for one in short), jnp.asarray(sizes))
    _, _, exact = plain(
        np.asarray(short[1], np.float64), w, sizes, np.asarray(short[0], np.float64)
    )
    assert rel_err(found, exact.swapaxes(1, 2)) < TOLERANCE["f32"]
    # BF16 in, FP32 out: nothing is rounded on the way.
    assert rel_err(call(*short, jnp.asarray(sizes)), exact.swapaxes(1, 2)) < TOLERANCE["f32"]


def test_a_wrong_answer_is_seen(seed):
    x, w, sizes, grad = drawn("odd sizes", seed)
    moved = sizes.copy()
    moved[1] -= 1
    moved[2] += 1
    found = ours("blocks", x, w, moved, grad, jnp.float32)
    for one, exact in zip(found, plain(x, w, sizes, grad), strict=True):
        assert not rel_err(one, exact) < TOLERANCE["f32"]


def test_group_sizes_are_data_not_shapes(seed):
    x, w, sizes, grad = drawn("odd sizes", seed)
    traces = []

    @jax.jit
    def run(sizes):
        traces.append(sizes)
        return grouped_matmul(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), sizes)

    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        exact, _, _ = plain(x, w, sizes[order], grad)
        assert rel_err(run(jnp.asarray(sizes[order])), exact) < TOLERANCE["f32"]
    assert len(traces) == 1


def test_errors_name_what_does_not_fit():
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(2, 4, 5\), \(2,\)"):
        grouped_matmul(x, jnp.zeros((2, 4, 5)), sizes)
    with pytest.raises(ValueError, match=r"sizes \[G\]; got .*\(3,\)"):
        grouped_matmul(x, w, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"'cuda'; there are .*'blocks'"):
        grouped_matmul(x, w, sizes, implementation="cuda")
    with pytest.raises(ValueError, match=r"grouped_wgrad wants dy .* \(5, 2\), \(4, 3\), \(2,\)"):
        grouped_wgrad(jnp.zeros((5, 2)), x, sizes)
