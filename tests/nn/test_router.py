"""Both gates against a brute force over experts, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import numpy_model
from dsjax import sharding
from dsjax.config import SigmoidRouter, SoftmaxRouter
from dsjax.nn.router import GATES
from dsjax.params import FullPrecision
from tests.tolerance import TOLERANCE, rel_err

M, D, E, K = 24, 6, 12, 3
ROUTERS = [
    SoftmaxRouter(),
    SoftmaxRouter(num_groups=4, kept_groups=2, scale=16.0),
    SoftmaxRouter(num_groups=6, kept_groups=2, normalize=True),
    SigmoidRouter(scale=2.827),
    SigmoidRouter(num_groups=4, kept_groups=2, scale=2.5),
    SigmoidRouter(num_groups=3, kept_groups=1, normalize=False),
]


def gate_and_inputs(router, seed: int, *, ties: bool = False):
    rng = np.random.default_rng(seed)
    gate = GATES[type(router)](router, D, E, K, std=1.0, rngs=nnx.Rngs(0))
    draw = (lambda shape: rng.integers(-1, 2, shape) / 2) if ties else rng.standard_normal
    gate.gate_proj[...] = jnp.asarray(draw((D, E)), jnp.float32)
    if isinstance(router, SigmoidRouter):
        # Of few values, so that equal scores stay equal; and below zero, as trained ones can be.
        gate.bias[...] = jnp.asarray(rng.integers(-4, 2, E) / 4, jnp.float32)
    return gate, jnp.asarray(draw((M, D)), jnp.float32)


def brute(router, gate, x_MD) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    config = {
        "num_experts_per_tok": K,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid" if isinstance(router, SigmoidRouter) else "softmax",
        "topk_method": "by_group",
        "n_group": router.num_groups,
        "topk_group": router.kept_groups,
        "norm_topk_prob": router.normalize,
    }
    bias_E = np.asarray(gate.bias[...], np.float64) if hasattr(gate, "bias") else None
    # In float32, where equal inputs give equal logits in both programs.
    logits_ME = np.asarray(x_MD, np.float64) @ np.asarray(gate.gate_proj[...], np.float64)
    tokens = [numpy_model.choose(config, logits_E, bias_E) for logits_E in logits_ME]
    score_ME, choice_MK, weight_MK = (np.array(part) for part in zip(*tokens, strict=True))
    return score_ME, choice_MK, weight_MK * router.scale


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_choice_and_weights_are_the_brute_force_ones(router, ties, seed):
    gate, x_MD = gate_and_inputs(router, seed, ties=ties)
    score_ME, choice_MK, weight_MK = brute(router, gate, x_MD)
    if ties:
        assert len(np.unique(score_ME[0].round(12))) < E
    routing = gate(x_MD)
    np.testing.assert_array_equal(routing.choice_MK, choice_MK)
    assert rel_err(routing.weight_MK, weight_MK) < TOLERANCE["f32"]
    share_ME = score_ME / score_ME.sum(-1, keepdims=True)
    assert rel_err(routing.share_ME, share_ME) < TOLERANCE["f32"]


@pytest.mark.parametrize("router", [ROUTERS[0], ROUTERS[4]], ids=repr)
def test_all_equal_scores_choose_the_first_experts(router):
    gate, _ = gate_and_inputs(router, 0)
    gate.gate_proj[...] = jnp.zeros((D, E))
    if isinstance(router, SigmoidRouter):
        gate.bias[...] = jnp.zeros(E)
    choice_MK = gate(jnp.ones((2, D))).choice_MK
    np.testing.assert_array_equal(choice_MK, [[0, 1, 2]] * 2)


def test_a_sigmoid_group_counts_as_its_two_best_a_softmax_group_as_its_best():
    # Group 0 has the single best expert, group 1 the best pair.
    logits_E = np.full(E, -9.0)
    logits_E[[0, 4, 5]] = 2.0, 1.5, 1.4
    found = {}
    for kind in (SoftmaxRouter, SigmoidRouter):
        gate, _ = gate_and_inputs(kind(num_groups=3, kept_groups=1), 0)
        gate.gate_proj[...] = jnp.asarray(np.vstack([logits_E, np.zeros((D - 1, E))]), jnp.float32)
        if kind is SigmoidRouter:
            gate.bias[...] = jnp.zeros(E)
        found[kind] = np.asarray(gate(jnp.eye(1, D)).choice_MK)[0] // 4
    assert set(found[SoftmaxRouter]) == {0}
    assert set(found[SigmoidRouter]) == {1}


def test_groups_left_out_stay_out_when_every_biased_score_is_negative():
    router = SigmoidRouter(num_groups=4, kept_groups=2)
    gate, x_MD = gate_and_inputs(router, 1)
    gate.bias[...] = jnp.full(E, -5.0)
    np.testing.assert_array_equal(gate(x_MD).choice_MK, brute(router, gate, x_MD)[1])


def test_bias_picks_and_never_weighs():
    router = SigmoidRouter(normalize=False)
    gate, x_MD = gate_and_inputs(router, 2)
    gate.bias[...] = jnp.zeros(E).at[7].set(10.0)
    routing = gate(x_MD)
    np.testing.assert_array_equal(routing.choice_MK[:, 0], np.full(M, 7))
    score_ME = 1 / (1 + np.exp(-np.asarray(x_MD) @ np.asarray(gate.gate_proj[...])))
    assert rel_err(routing.weight_MK[:, 0], score_ME[:, 7]) < TOLERANCE["f32"]
    # What the balance loss counts is the choice by plain score.
    plain_MK = np.argsort(-score_ME, axis=-1, kind="stable")[:, :K]
    np.testing.assert_array_equal(routing.wanted_MK, plain_MK)


@pytest.mark.parametrize("router", [ROUTERS[1], ROUTERS[2], ROUTERS[4], ROUTERS[5]], ids=repr)
def test_gradient_of_the_weights_is_the_finite_difference(router, seed):
    gate, x_MD = gate_and_inputs(router, seed)
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        along, direction = (jnp.asarray(rng.standard_normal(s)) for s in ((M, K), (D, E)))
        base = jnp.asarray(gate.gate_proj[...], jnp.float64)
        wide_MD = x_MD.astype(jnp.float64)

        @jax.jit
        def value(gate_DE):
            moved = jax.tree.map(
                lambda v: v.replace(gate_DE) if isinstance(v, FullPrecision) else v,
                gate,
                is_leaf=sharding.is_variable,
            )
            return (moved(wide_MD).weight_MK * along).sum()

        slope = (jax.grad(value)(base) * direction).sum()
        ahead, behind = value(base + 1e-6 * direction), value(base - 1e-6 * direction)
        assert float(slope) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-6)


def test_the_bias_has_no_gradient(seed):
    gate, x_MD = gate_and_inputs(ROUTERS[4], seed)

    def value(gate):
        routing = gate(x_MD)
        return routing.weight_MK.sum() + (routing.share_ME**2).sum()

    assert not np.any(jax.grad(value)(gate).bias[...])


def test_scores_are_float32_whatever_comes_in(seed):
    gate, x_MD = gate_and_inputs(ROUTERS[4], seed)
    routing = gate(x_MD.astype(jnp.bfloat16))
    assert routing.weight_MK.dtype == routing.share_ME.dtype == jnp.float32
    exact = gate(x_MD.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(routing.weight_MK, exact.weight_MK)
