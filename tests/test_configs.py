"""Every file of configs/: its exact size against the published one, and that it really trains."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Model, Moe
from dsjax.model import abstract
from dsjax.params import RouterBias, count
from dsjax.run import Files, LearningRate, StepDecay
from dsjax.run_file import load
from dsjax.train_step import make_train_step
from tests import drawn

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
TINY = [name for name in FILES if name.startswith("tiny")]

# All tensors of the published files, the selection biases included, without the MTP layer.
PUBLISHED = {
    "v2_lite": 15_706_484_224,
    "v2": 235_741_434_880,
    "v3": 671_026_419_200,
    "kimi_k2": 1_026_408_232_448,
}
# In billions: what one token multiplies with, embedding and head counted, as the reports round it.
ACTIVE = {"v2_lite": (2.4, 0.3), "v2": (21.0, 0.5), "v3": (37.55, 0.01), "kimi_k2": (32.9, 0.05)}


def spec(name: str) -> Model:
    return load(FOLDER / f"{name}.py").model


def active(model: Model) -> int:
    """Every main weight but those of the routed experts a token does not choose."""
    built = abstract(model)
    idle = 0
    for block in model.blocks:
        if isinstance(block.ffn, Moe):
            one = 3 * model.hidden_size * block.ffn.intermediate_size
            idle += (block.ffn.num_experts - block.ffn.num_chosen) * one
    return count(built) - count(built.mtp) - idle


def test_every_published_model_has_its_miniature():
    assert {f"tiny_{name}" for name in PUBLISHED} <= set(TINY)
    assert set(FILES) == set(PUBLISHED) | set(TINY)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_the_published_one(name):
    model = abstract(spec(name))
    assert count(model) - count(model.mtp) == PUBLISHED[name]


def test_mtp_of_v3_adds_what_layer_61_has_of_its_own():
    # 13,463,426,304 numbers in the file, of which embedding and head are copies.
    assert count(abstract(spec("v3")).mtp) == 13_463_426_304 - 2 * 926_679_040
    assert not spec("kimi_k2").mtp and not spec("v2").mtp and not spec("v2_lite").mtp


def test_router_biases_are_counted_and_only_sigmoid_routers_have_them():
    counts = {name: count(abstract(spec(name)), RouterBias) for name in PUBLISHED}
    assert counts == {"v2_lite": 0, "v2": 0, "v3": 59 * 256, "kimi_k2": 60 * 384}


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_size_is_the_reported_one(name):
    billions, within = ACTIVE[name]
    assert active(spec(name)) / 1e9 == pytest.approx(billions, abs=within)


def test_v3_recipe_counts_tokens():
    run = load(FOLDER / "v3.py")
    ramp = round(run.batch.ramp_until * run.steps)
    sizes = np.full(run.steps, run.batch.size, np.float64)
    sizes[:ramp] = np.linspace(run.batch.ramp_from, run.batch.size, ramp)
    tokens = np.concatenate([[0.0], np.cumsum(sizes * run.batch.length)])
    rate = run.optim.learning_rate
    assert isinstance(rate, LearningRate)
    for fraction, seen in [
        (run.batch.ramp_until, 469e9),
        (rate.constant_until, 10e12),
        (rate.cosine_until, 14.3e12),
        (rate.tail_until, 14.633e12),
        (1.0, 14.8e12),
    ]:
        assert tokens[round(fraction * run.steps)] == pytest.approx(seen, rel=1e-3)


def test_v2_recipes_cut_the_rate_where_the_report_does():
    for name, peak, at, tokens in [
        ("v2", 2.4e-4, (0.6, 0.9), 8.1e12),
        ("v2_lite", 4.2e-4, (0.8, 0.9), 5.7e12),
    ]:
        run = load(FOLDER / f"{name}.py")
        assert run.optim.learning_rate == StepDecay(peak=peak, warmup_steps=2000, at=at)
        ramp = run.batch.ramp_until * run.steps
        first = run.batch.ramp_from or run.batch.size
        mean = (
            ramp * (first + run.batch.size) / 2 + (run.steps - ramp) * run.batch.size
        ) / run.steps
        assert mean * run.batch.length * run.steps == pytest.approx(tokens, rel=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_ask_for_files_and_the_miniatures_keep_their_switches(name):
    published, tiny = load(FOLDER / f"{name}.py"), load(FOLDER / f"tiny_{name}.py")
    assert isinstance(published.data, Files) and not isinstance(tiny.data, Files)

    def switches(model: Model):
        first, last = model.blocks[0], model.blocks[-1]
        return (
            model.layers[0].repeat,
            type(first.ffn),
            first.attention.q_lora_rank is None,
            first.attention.rope,
            last.ffn.router,
            last.ffn.num_shared,
            len(model.mtp),
            model.max_position_embeddings,
        )

    assert switches(published.model) == switches(tiny.model)
    assert type(published.optim.learning_rate) is type(tiny.optim.learning_rate)
    assert published.objective.balance_weight == tiny.objective.balance_weight


# `make train` is a test of configs/tiny.py.
@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(TINY) - {"tiny"}))
def test_a_miniature_takes_two_steps(name, seed):
    run = load(FOLDER / f"{name}.py")
    assert run.model.vocab_size == 320  # bytes and specials, padded
    state = drawn.state(run, seed, spread=0.05)
    batch = drawn.batch(seed, rows=2, length=32, vocab=258)
    used = jnp.int32(1)
    step = make_train_step(run).lower(state, batch, used).compile(drawn.FAST_COMPILE)
    for _ in range(2):
        before = drawn.leaves(state.model)
        state, metrics = step(state, batch, used)
        assert float(metrics["loss"]) == pytest.approx(np.log(320), rel=0.2)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    after = drawn.leaves(state.model)
    still = [path for path in after if (after[path] == before[path]).all()]
    assert still == []
