"""Cross-entropy against NumPy float64, targets of packed rows by hand, and logits never whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dsjax import losses
from dsjax.losses import Batch, Prediction, cross_entropy, target_count, targets
from dsjax.train_step import init_state, make_train_step
from tests import drawn
from tests.tolerance import TOLERANCE, rel_err

B, T, D, V = 3, 12, 5, 11


def plain(hidden_BTD, head_DV, targets_BT, valid_BT) -> tuple[float, int]:
    nats, correct = 0.0, 0
    for b, t in zip(*np.nonzero(valid_BT), strict=True):
        logits_V = hidden_BTD[b, t] @ head_DV
        nats += np.log(np.exp(logits_V).sum()) - logits_V[targets_BT[b, t]]
        correct += int(logits_V.argmax() == targets_BT[b, t])
    return nats, correct


def inputs(seed: int):
    rng = np.random.default_rng(seed)
    hidden_BTD, head_DV = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    targets_BT, valid_BT = rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.7
    targets_BT[0] = (hidden_BTD[0] @ head_DV).argmax(-1)  # guessed rightly
    valid_BT[0, 0] = True
    return hidden_BTD, head_DV, targets_BT.astype(np.int32), valid_BT


def scored(hidden_BTD, head_DV, targets_BT, valid_BT, *, weight: float = 1.0):
    return cross_entropy([Prediction(hidden_BTD, targets_BT, valid_BT, weight)], head_DV)


@pytest.mark.parametrize("block", [1, 4, 5, 512])
def test_sum_and_hits_for_every_block_size(block, seed, monkeypatch):
    monkeypatch.setattr(losses, "TOKEN_BLOCK", block)
    nats, correct = plain(*inputs(seed))
    with jax.enable_x64(True):
        weighted, (score,) = scored(*map(jnp.asarray, inputs(seed)), weight=0.3)
    assert float(score.nats) == pytest.approx(nats, rel=TOLERANCE["f64"])
    assert float(weighted) == pytest.approx(0.3 * nats, rel=TOLERANCE["f64"])
    assert score.correct == correct > 0


def test_gradients_are_softmax_minus_one_hot(seed):
    """Of two predictions that share the head, each with its weight, and of a multiple of it all."""
    weights, drawn_twice = (0.3, 0.7), [inputs(seed), inputs(seed + 1)]
    head_DV = drawn_twice[0][1]

    def thrice(states, head_DV):
        predictions = [
            Prediction(hidden_BTD, *map(jnp.asarray, targets), weight)
            for hidden_BTD, (_, _, *targets), weight in zip(
                states, drawn_twice, weights, strict=True
            )
        ]
        return 3 * cross_entropy(predictions, head_DV)[0]

    with jax.enable_x64(True):
        states = [jnp.asarray(hidden_BTD) for hidden_BTD, *_ in drawn_twice]
        of_states, of_head = jax.grad(thrice, argnums=(0, 1))(states, jnp.asarray(head_DV))
    expected = 0
    for weight, found, (hidden_BTD, _, targets_BT, valid_BT) in zip(
        weights, of_states, drawn_twice, strict=True
    ):
        exp_BTV = np.exp(hidden_BTD @ head_DV)
        logit_grad_BTV = exp_BTV / exp_BTV.sum(-1, keepdims=True) - np.eye(V)[targets_BT]
        logit_grad_BTV *= 3 * weight * valid_BT[..., None]
        assert rel_err(found, logit_grad_BTV @ head_DV.T) < TOLERANCE["f64"]
        expected += np.einsum("btd,btv->dv", hidden_BTD, logit_grad_BTV)
    assert rel_err(of_head, expected) < TOLERANCE["f64"]


@pytest.mark.parametrize(("wanted", "products"), [("sum", 1), ("gradients", 3)])
def test_logits_are_computed_once(wanted, products, seed):
    # Three products with gradients: logits, and those of the tokens and of the head.
    def nats(*operands):
        return scored(*operands)[0]

    function = nats if wanted == "sum" else jax.grad(nats, argnums=(0, 1))
    traced = jax.make_jaxpr(function)(*map(jnp.asarray, inputs(seed)))
    names = [eqn.primitive.name for jaxpr in every_jaxpr(traced.jaxpr) for eqn in jaxpr.eqns]
    assert names.count("dot_general") == products


def test_large_logits_do_not_overflow():
    hidden_BTD = jnp.full((1, 2, 1), 1e4, jnp.float32)
    _, (score,) = scored(
        hidden_BTD, jnp.array([[1.0, -1.0]]), jnp.array([[0, 1]]), jnp.ones((1, 2), bool)
    )
    assert (float(score.nats), float(score.correct)) == (2e4, 1.0)


def packed() -> Batch:
    tokens_BT = jnp.array([[10, 11, 12, 13, 20, 21, 0], [30, 40, 41, 42, 43, 44, 45]])
    segments_BT = jnp.array([[1, 1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2]])
    return Batch(tokens_BT, segments_BT, jnp.zeros_like(tokens_BT))


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [
        (0, [[11, 12, 13, None, 21, None, None], [None, 41, 42, 43, 44, 45, None]]),
        (1, [[12, 13, None, None, None, None, None], [None, 42, 43, 44, 45, None, None]]),
        (2, [[13, None, None, None, None, None, None], [None, 43, 44, 45, None, None, None]]),
        (6, [[None] * 7] * 2),
    ],
)
def test_targets_never_cross_a_document(depth, wanted):
    tokens_BT, valid_BT = targets(packed(), depth)
    pairs = zip(np.asarray(tokens_BT), np.asarray(valid_BT), strict=True)
    found = [
        [int(token) if valid else None for token, valid in zip(*row, strict=True)] for row in pairs
    ]
    assert found == wanted
    assert target_count(packed(), depth) == sum(t is not None for row in wanted for t in row)


def test_a_deep_target_does_not_reach_a_later_document_of_the_same_row():
    # Depth 2 jumps over a whole document; equal numbers would be a coincidence of packing.
    tokens_BT, segments_BT = jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 2, 3, 3]])
    batch = Batch(tokens_BT, segments_BT, jnp.zeros_like(tokens_BT))
    assert target_count(batch, 1) == 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_train_step_never_holds_all_logits(remat):
    # Sizes that nothing else in the step has.
    rows, length, vocab = 2, 24, 37
    run = drawn.run(drawn.model(vocab_size=vocab), remat=remat, precision="bf16")
    state = jax.eval_shape(lambda: init_state(run))
    batch = drawn.batch(0, rows=rows, length=length, vocab=vocab)
    traced = make_train_step(run).trace(state, batch, jax.ShapeDtypeStruct((), jnp.int32))
    shapes = {shape for jaxpr in every_jaxpr(traced.jaxpr.jaxpr) for shape in outputs(jaxpr)}
    assert (rows, length // 2, vocab) in shapes
    with_all_tokens = {
        s for s in shapes if s[-1:] == (vocab,) and np.prod(s) == rows * length * vocab
    }
    assert with_all_tokens == set()


def every_jaxpr(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from every_jaxpr(inner)


def outputs(jaxpr) -> set[tuple[int, ...]]:
    return {
        tuple(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "shape")
    }
