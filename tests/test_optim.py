"""Schedules by hand at every joint, AdamW against NumPy float64, and the router-bias rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsjax import optim
from dsjax.params import RouterBias
from dsjax.run import LearningRate, Optim, Piecewise, StepDecay
from tests.tolerance import TOLERANCE, rel_err


def values(schedule, steps: list[int]) -> list[float]:
    return [float(jax.jit(schedule)(jnp.int32(step))) for step in steps]


def test_v3_schedule_at_every_joint():
    config = LearningRate(
        peak=8.0,
        warmup_steps=4,
        constant_until=0.2,
        cosine_until=0.6,
        tail_until=0.8,
        final=0.25,
        last=0.125,
    )
    # Warm-up to 4, constant to 10, cosine to 30, first tail to 40, second tail.
    expected = {0: 0, 1: 2, 3: 6, 4: 8, 9: 8, 10: 8, 20: (8 + 2) / 2, 30: 2, 39: 2, 40: 1, 49: 1}
    expected |= {
        15: 2 + 6 * (1 + np.cos(np.pi / 4)) / 2,
        29: 2 + 6 * (1 + np.cos(0.95 * np.pi)) / 2,
    }
    found = values(optim.learning_rate(config, 50), list(expected))
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


def test_v2_schedule_at_every_joint():
    config = StepDecay(peak=10.0, warmup_steps=5, at=(0.6, 0.9), factor=0.5)
    expected = {0: 0, 1: 2, 4: 8, 5: 10, 11: 10, 12: 5, 17: 5, 18: 2.5, 19: 2.5}
    found = values(optim.learning_rate(config, 20), list(expected))
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [LearningRate(peak=1.0, warmup_steps=20), StepDecay(peak=1.0, warmup_steps=20)],
    ids=lambda config: type(config).__name__,
)
def test_a_run_shorter_than_its_warm_up_only_warms_up(config):
    found = values(optim.learning_rate(config, 10), list(range(10)))
    np.testing.assert_allclose(found, np.arange(10) / 20, rtol=1e-6)


def test_default_fractions_are_v3_s_tokens():
    found = values(optim.learning_rate(LearningRate(peak=2.2e-4, warmup_steps=2000), 148_000), [
        2_000, 99_999, 143_000, 146_329, 146_330, 147_999,
    ])  # fmt: skip
    np.testing.assert_allclose(found, [2.2e-4, 2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6], rtol=1e-6)


def test_piecewise_jumps_at_the_first_step_of_its_fraction():
    value = Piecewise(steps=((0.0, 0.3), (0.25, 0.1), (0.95, 0.0)))
    found = values(optim.piecewise(value, 10), [0, 2, 3, 9, 10])
    np.testing.assert_allclose(found, [0.3, 0.3, 0.1, 0.1, 0.0], rtol=1e-6)
    assert values(optim.piecewise(Piecewise(steps=((0.0, 7.0),)), 10), [0, 9]) == [7.0, 7.0]


@pytest.mark.parametrize("steps", [(), ((0.1, 1.0),), ((0.0, 1.0), (1.5, 2.0))], ids=str)
def test_piecewise_refuses_what_leaves_a_step_without_value(steps):
    with pytest.raises(ValueError, match=r"Piecewise.steps is .* begin at 0.0"):
        Piecewise(steps=steps)


def test_bias_moves_by_exactly_the_rate_towards_equal_load():
    load_LE = jnp.array([[4.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    found = optim.moved_bias(jnp.ones((2, 4)), load_LE, jnp.float32(0.25))
    np.testing.assert_array_equal(found, [[0.75, 1.25, 1, 1], [1, 1, 1, 1]])


def test_biases_take_their_loads_in_order():
    first, second = (RouterBias(jnp.zeros(shape), axes=(None,)) for shape in ((2, 3), (2,)))
    state = nnx.State({"a": first, "b": second})
    loads = (jnp.array([[3.0, 0, 0], [0, 3, 0]]), jnp.array([0.0, 8.0]))
    moved = optim.move_router_biases(state, loads, jnp.float32(1.0))
    np.testing.assert_array_equal(moved["a"][...], [[-1, 1, 1], [1, -1, 1]])
    np.testing.assert_array_equal(moved["b"][...], [1, -1])
    with pytest.raises(ValueError, match="shorter"):
        optim.move_router_biases(state, loads[:1], jnp.float32(1.0))


class Two(nnx.Module):
    """A stacked norm scale, which has two dimensions but is no matrix, and a matrix."""

    def __init__(self, scale: np.ndarray, matrix: np.ndarray):
        self.scale = nnx.Param(jnp.asarray(scale, jnp.float32), axes=(None,))
        self.matrix = nnx.Param(jnp.asarray(matrix, jnp.float32), axes=("embed", "ffn"))


def test_adamw_is_numpy_s(seed):
    rng = np.random.default_rng(seed)
    config = Optim(
        learning_rate=LearningRate(peak=0.1, warmup_steps=2, constant_until=1.0, cosine_until=1.0),
        beta1=0.8,
        beta2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        clip_norm=2.0,
    )
    weights = {"scale": rng.standard_normal((3, 4)), "matrix": rng.standard_normal((4, 5))}
    ours = Two(weights["scale"], weights["matrix"])
    optimizer = optim.adamw(config, 10)
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    first = {k: np.zeros(w.shape) for k, w in weights.items()}
    second = {k: np.zeros(w.shape) for k, w in weights.items()}
    clipped = []
    for step in range(6):
        # Some gradients beyond the clipping norm, some within.
        size = 3.0 if step % 2 else 0.1
        grads = {k: size * rng.standard_normal(w.shape) for k, w in weights.items()}
        updates, state = update(Two(grads["scale"], grads["matrix"]), state, ours)
        ours = optax.apply_updates(ours, updates)

        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        clipped.append(norm > 2.0)
        rate = 0.1 * min(step / 2, 1.0)
        for k, grad in grads.items():
            grad = grad * min(1.0, 2.0 / norm)
            first[k] = 0.8 * first[k] + 0.2 * grad
            second[k] = 0.9 * second[k] + 0.1 * grad**2
            mean, square = first[k] / (1 - 0.8 ** (step + 1)), second[k] / (1 - 0.9 ** (step + 1))
            decay = 0.5 * weights[k] if k == "matrix" else 0.0
            weights[k] = weights[k] - rate * (mean / (np.sqrt(square) + 1e-3) + decay)
        for k, weight in weights.items():
            assert rel_err(getattr(ours, k)[...], weight) < TOLERANCE["f32"], (step, k)
    assert set(clipped) == {True, False}


def test_moments_in_bfloat16_are_rounded_once_a_step(seed):
    rng = np.random.default_rng(seed)
    rate = LearningRate(peak=0.1, warmup_steps=0, constant_until=1.0, cosine_until=1.0)
    config = Optim(learning_rate=rate, eps=1e-3, weight_decay=0.0, clip_norm=1e9, moments="bf16")
    ours = Two(np.zeros((3, 4)), rng.standard_normal((4, 5)))
    optimizer = optim.adamw(config, 10)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)
    weight = np.asarray(ours.matrix[...])
    first = second = np.zeros((4, 5), jnp.bfloat16)
    for step in range(5):
        grad = rng.standard_normal((4, 5)).astype(np.float32)
        updates, state = update(Two(np.zeros((3, 4)), grad), state, ours)
        ours = optax.apply_updates(ours, updates)
        wide = 0.9 * first.astype(np.float64) + 0.1 * grad
        wide_square = 0.95 * second.astype(np.float64) + 0.05 * grad.astype(np.float64) ** 2
        first, second = (x.astype(np.float32).astype(jnp.bfloat16) for x in (wide, wide_square))
        mean, square = wide / (1 - 0.9 ** (step + 1)), wide_square / (1 - 0.95 ** (step + 1))
        weight = weight - 0.1 * mean / (np.sqrt(square) + 1e-3)
        assert rel_err(ours.matrix[...], weight) < TOLERANCE["f32"], step
    moments = [x for x in jax.tree.leaves(state) if x.shape == (4, 5)]
    assert [x.dtype for x in moments] == [jnp.bfloat16] * 2
    for found, expected in zip(moments, (first, second), strict=True):
        # Float32 against float64 may land on the other side of a tie.
        assert (np.asarray(found) == expected).mean() > 0.9
        assert rel_err(found.astype(jnp.float32), expected.astype(np.float32)) < 2**-8
