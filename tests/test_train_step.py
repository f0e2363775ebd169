"""The training step: micro-batches, the ramp, the bias rule, precision, donation, and learning."""

import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import train_step
from dsjax.config import Block, Dense, LayerGroup, Model
from dsjax.losses import Batch
from dsjax.model import Transformer
from dsjax.params import RouterBias
from dsjax.run import LearningRate, Objective, Optim, Piecewise, Run
from dsjax.train_step import forward, make_train_step
from tests import drawn
from tests.tolerance import TOLERANCE, rel_err

SEED = 11


def flat_rate(peak: float) -> Optim:
    """A rate that is `peak` at every step, and no clipping to blur what a gradient is."""
    rate = LearningRate(
        peak=peak, warmup_steps=0, constant_until=1.0, cosine_until=1.0, tail_until=1.0
    )
    return Optim(learning_rate=rate, clip_norm=1e9)


def plain_run(**changes: object) -> Run:
    # An eps that large leaves Adam's first update proportional to the gradient.
    changes = {"optim": Optim(learning_rate=flat_rate(1.0).learning_rate, eps=1e3)} | changes
    return drawn.run(drawn.model(repeat=1), **changes)


@functools.cache
def compiled(run: Run, micros: int, rows: int):
    """One compilation for every test that can share it."""
    state = jax.eval_shape(lambda: drawn.state(run, SEED))
    batch = drawn.batch(0, micros=micros, rows=rows)
    lowered = make_train_step(run).lower(state, batch, jnp.int32(micros))
    return lowered.compile(drawn.FAST_COMPILE)


def regrouped(batch: Batch, micros: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(micros, -1, x.shape[-1]), batch)


def outcome(run: Run, batch: Batch, used: int | None = None):
    micros, rows = batch.tokens_BT.shape[:2]
    step = compiled(run, micros, rows)
    state, metrics = step(drawn.state(run, SEED), batch, jnp.int32(used or micros))
    return drawn.leaves((state.model, state.opt_state)), metrics


def assert_same(one, other):
    (state, metrics), (other_state, other_metrics) = one, other
    for path, value in state.items():
        assert rel_err(value, other_state[path]) < 10 * TOLERANCE["f32"], path
    for value, expected in zip(*map(jax.tree.leaves, (metrics, other_metrics)), strict=True):
        assert rel_err(value, expected) < TOLERANCE["f32"]


@pytest.mark.parametrize("micros", [4, pytest.param(2, marks=pytest.mark.thorough)])
def test_micro_batches_add_up_to_the_whole_batch(micros):
    # Documents and padding differ between the parts, so means of means would be something else.
    run, whole = plain_run(), drawn.batch(1)
    assert_same(outcome(run, regrouped(whole, micros)), outcome(run, whole))


def test_unused_micro_batches_change_nothing_and_need_no_compilation():
    run, batch = plain_run(), regrouped(drawn.batch(1), 4)
    junk = jax.tree.map(lambda x: x.at[2:].set(1), batch)
    state, metrics = outcome(run, junk, used=2)
    # Every row twice has the means, and so the gradients, of every row once.
    twice = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[:2]]), batch)
    known, whole = outcome(run, regrouped(twice, 1))
    for path, value in state.items():
        assert rel_err(value, known[path]) < 10 * TOLERANCE["f32"], path
    assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]), rel=TOLERANCE["f32"])
    assert metrics["tokens"] == whole["tokens"] / 2


def biases(model: Transformer) -> list[np.ndarray]:
    found = jax.tree.leaves(model, is_leaf=lambda v: isinstance(v, RouterBias))
    return [np.asarray(v.get_value()) for v in found if isinstance(v, RouterBias)]


def test_router_biases_move_by_exactly_the_rate_towards_equal_load():
    run = plain_run()
    before = biases(drawn.state(run, SEED).model)
    step = compiled(run, 1, 8)
    state, metrics = step(drawn.state(run, SEED), drawn.batch(1), jnp.int32(1))
    after = biases(state.model)
    assert [b.shape for b in after] == [np.shape(load) for load in metrics["loads"]]
    assert [b.shape for b in after] == [(1, 8)]
    counted = int((drawn.batch(1).segments_BT != 0).sum())
    for old, new, load in zip(before, after, metrics["loads"], strict=True):
        load = np.asarray(load)
        assert (load.sum(-1) == 2 * counted).all() and metrics["tokens"] == counted
        sign = np.sign(load.mean(-1, keepdims=True) - load).astype(np.float32)
        np.testing.assert_array_equal(new, old + np.float32(0.001) * sign)


def test_bias_rate_and_mtp_weight_follow_the_run():
    """At the last step the bias rests and MTP weighs 0.1; at the first it moves and 0.3."""
    run, batch = plain_run(), drawn.batch(1)
    step = compiled(run, 1, 8)
    for at, moved, weight in [(0, True, 0.3), (9, True, 0.1), (10, False, 0.1)]:
        before = drawn.state(run, SEED)._replace(step=jnp.int32(at))
        old = biases(before.model)
        after, metrics = step(before, batch, jnp.int32(1))
        changed = any((a != b).any() for a, b in zip(biases(after.model), old, strict=True))
        assert changed == moved, at
        expected = metrics["loss"] + weight * metrics["mtp1_loss"]
        expected += run.objective.balance_weight * metrics["balance_loss"]
        assert float(metrics["objective"]) == pytest.approx(float(expected), rel=1e-6)
        assert int(after.step) == at + 1


@pytest.mark.thorough
def test_the_objective_has_no_gradient_in_the_bias():
    run, batch = plain_run(), jax.tree.map(lambda x: x[0], drawn.batch(1))

    def objective(model):
        entropy, sums = forward(model, batch, [1.0] * (1 + len(model.mtp)), remat="none")
        return entropy + sums.balance

    gradient = jax.jit(jax.grad(objective)).lower(drawn.state(run, SEED).model)
    gradient = gradient.compile(drawn.FAST_COMPILE)(drawn.state(run, SEED).model)
    assert not any(b.any() for b in biases(gradient))
    others = {k: v for k, v in drawn.leaves(gradient).items() if "bias" not in k}
    assert [path for path, value in others.items() if not value.any()] == []


# How much of a gradient the roundings change: of BF16's eight bits and of FP8's three, in one layer
# after the other; and here and there they send a token to another expert.
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        ("bf16", 2.0**-9, 2.0**-3),
        ("fp8", 2.0**-6, 2.0**-1),
    ],
)
def test_weights_and_moments_stay_float32_in_every_precision(precision, least, most):
    run, batch = plain_run(), drawn.batch(1)
    exact, _ = outcome(run, batch)
    rough, metrics = outcome(plain_run(precision=precision), batch)
    floats = {k: v.dtype for k, v in rough.items() if v.dtype.kind == "f"}
    assert set(floats.values()) == {np.dtype("float32")}
    # The first moment is a tenth of the gradient.
    (name,) = (path for path in exact if ".mu" in path and "o_proj" in path and "mtp" not in path)
    assert least < rel_err(rough[name], exact[name]) < most
    assert metrics["loss"].dtype == jnp.float32


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is x86's")
def test_products_of_large_factors_are_onednn_s_and_the_same(monkeypatch):
    attention = drawn.model().layers[0].pattern[0].attention
    block = Block(attention=attention, ffn=Dense(intermediate_size=256))
    layers = (LayerGroup(repeat=1, pattern=(block,)),)
    model = Model(vocab_size=32, hidden_size=128, layers=layers, initializer_std=0.1)
    run = drawn.run(model, optim=Optim(learning_rate=flat_rate(1.0).learning_rate, eps=1e3))
    batch = drawn.batch(2, rows=4, length=128)
    results = []
    for options, is_used in ((train_step.ONEDNN, True), ({}, False)):
        monkeypatch.setattr(train_step, "ONEDNN", options)
        state = drawn.state(run, SEED, spread=0.05)
        step = make_train_step(run).lower(state, batch, jnp.int32(1)).compile(drawn.FAST_COMPILE)
        assert ("__onednn$matmul" in step.as_text()) == is_used
        state, metrics = step(state, batch, jnp.int32(1))
        results.append((drawn.leaves((state.model, state.opt_state)), metrics))
    assert_same(*results)


def test_the_state_is_donated():
    run = plain_run()
    state = drawn.state(run, SEED)
    compiled(run, 1, 8)(state, drawn.batch(1), jnp.int32(1))
    kept = [x for x in jax.tree.leaves(state) if not x.is_deleted()]
    assert kept == []


@pytest.mark.thorough
def test_loss_falls_on_a_task_that_can_be_learnt():
    """t_{i+1} = t_i + 3 (mod 32): from ln 32 = 3.5 nats to a few hundredths."""
    run = drawn.run(
        drawn.model(repeat=1),
        optim=Optim(learning_rate=LearningRate(peak=2e-2, warmup_steps=5)),
        steps=60,
        objective=Objective(mtp_weight=Piecewise(steps=((0.0, 0.3),))),
    )
    state, step = drawn.state(run, SEED, spread=0.1), compiled(run, 1, 8)
    first, losses = np.random.default_rng(SEED).integers(0, 32, (run.steps, 1, 8, 1)), []
    for start in first:
        tokens_BT = jnp.asarray((start + 3 * np.arange(16)) % 32, jnp.int32)
        positions_BT = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens_BT.shape)
        batch = Batch(tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
        state, metrics = step(state, batch, jnp.int32(1))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(32), rel=0.1)
    assert np.mean(losses[-5:]) < 0.3
    assert float(metrics["mtp1_accuracy"]) > 0.9


def test_a_call_leaves_the_module_as_it_was():
    run = plain_run()
    model = drawn.state(run, SEED).model
    before, structure = drawn.leaves(model), jax.tree.structure(model)
    logits_BTV = model(jnp.zeros((1, 4), jnp.int32))
    assert logits_BTV.shape == (1, 4, 32)
    assert jax.tree.structure(model) == structure
    after = drawn.leaves(model)
    assert [path for path in before if (before[path] != after[path]).any()] == []


def test_a_batch_without_any_mtp_target_is_finite():
    run, batch = plain_run(), drawn.batch(1)
    # Documents of two tokens have a next token and none after it.
    index = jnp.arange(16, dtype=jnp.int32)
    pairs = Batch(
        batch.tokens_BT,
        jnp.broadcast_to(index // 2 + 1, batch.tokens_BT.shape),
        jnp.broadcast_to(index % 2, batch.tokens_BT.shape),
    )
    state, metrics = outcome(run, pairs)
    assert float(metrics["loss"]) > 0.0 and float(metrics["mtp1_loss"]) == 0.0
    assert all(np.isfinite(value).all() for value in state.values())
