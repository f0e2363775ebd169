"""The JAX model is transformers' model: logits, losses, and the gradient of every parameter.

Everything runs through the functions training uses: scanned layers, dispatched experts, and the
cross-entropy that never forms all logits. Names and layouts go through the table of `dsjax.hf`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import golden
import numpy_model
import weights
from dsjax import hf, losses
from dsjax.hf import names
from dsjax.losses import Batch
from dsjax.model import Transformer, default_places
from dsjax.train_step import forward
from tests.drawn import FAST_COMPILE
from tests.tolerance import TOLERANCE, rel_err

MTP_WEIGHT = 0.3
PRECISIONS = {"f64": jnp.float64, "f32": jnp.float32}


# `make parity` runs the others, too.
CHOSEN = {("v2_lite", "f32"), ("v3_odd", "f64")}
EVERY_CASE = [
    pytest.param(*case, marks=() if case in CHOSEN else pytest.mark.thorough)
    for case in itertools.product(cases.CASES, PRECISIONS)
]


@pytest.fixture
def x64(precision: str):
    """64-bit types for "f64"; "f32" goes without."""
    with jax.enable_x64(precision == "f64"):
        yield


def drawn_model(config: dict, seed: int, dtype: jnp.dtype) -> Transformer:
    return hf.load_weights(weights.draw_all(seed, config), hf.model_config(config), dtype=dtype)


def in_our_layout(gradients: dict[str, np.ndarray], model: Transformer) -> Transformer:
    """Gradients under hub names as a Transformer; the biases, which have none, become zeros."""
    shapes = {path: variable.shape for path, variable in names.variables(model)}
    zeros = {
        name: np.zeros(source.hub_shape(shapes[path]))
        for path, source in names.sources(model, model.config).items()
        for name in source.names.flat
        if path.endswith("router.bias")
    }
    return hf.load_weights(gradients | zeros, model.config, dtype=jnp.float64)


def main_and_zeros(known: golden.Golden) -> dict[str, np.ndarray]:
    """Gradients of the main loss; the MTP layers have none."""
    return {name: np.zeros_like(g) for name, g in known.total_gradients.items()} | known.gradients


def one_document_rows(tokens_BT: np.ndarray) -> Batch:
    tokens_BT = jnp.asarray(tokens_BT)
    return Batch(tokens_BT, jnp.ones_like(tokens_BT), default_places(tokens_BT).positions_BT)


@functools.partial(jax.jit, static_argnames="remat", compiler_options=FAST_COMPILE)
def logits_and_losses(
    model: Transformer, batch: Batch, remat: str = "none"
) -> tuple[list[jax.Array], list[jax.Array]]:
    """By depth; the losses as training computes them. Token 0 lies past the end of a row."""
    return all_logits(model, batch), mean_losses(model, batch, remat)[1]


def all_logits(model: Transformer, batch: Batch) -> list[jax.Array]:
    main = model.hidden(batch.tokens_BT, batch.places).hidden_BTD
    ahead = [losses.ahead(batch.tokens_BT, depth + 1) for depth in range(len(model.mtp))]
    states, _ = model.mtp_hidden(main, ahead, batch.places)
    return [model.logits(hidden_BTD) for hidden_BTD in (main, *states)]


def mean_losses(
    model: Transformer, batch: Batch, remat: str, mtp_weight: jax.Array | float = 1.0
) -> tuple[jax.Array, list[jax.Array]]:
    """loss + weight * mean(MTP losses), which has gradients, and the losses by depth."""
    depths, dtype = len(model.mtp), model.lm_head.dtype
    counts = [losses.target_count(batch, depth).astype(dtype) for depth in range(depths + 1)]
    shares = [1.0] + [mtp_weight / max(depths, 1)] * depths
    weights = [share / count for share, count in zip(shares, counts, strict=True)]
    total, sums = forward(model, batch, weights, remat=remat)
    return total, [nats / count for nats, count in zip(sums.nats, counts, strict=True)]


@functools.partial(jax.jit, static_argnames="remat", compiler_options=FAST_COMPILE)
def outcome(
    model: Transformer, batch: Batch, mtp_weight: jax.Array, remat: str = "none"
) -> tuple[Transformer, list[jax.Array], list[jax.Array]]:
    """d (loss + weight * mean(MTP losses)) / d every variable, biases included; losses; logits.

    One program, as two would take half as long again to compile.
    """

    def total(model: Transformer) -> tuple[jax.Array, list[jax.Array]]:
        return mean_losses(model, batch, remat, mtp_weight)

    return *jax.grad(total, has_aux=True)(model), all_logits(model, batch)


def assert_same_gradients(found: Transformer, expected: Transformer, bound: float) -> None:
    """Parameter by parameter, in a stack of layers layer by layer."""
    known = dict(names.variables(expected))
    assert len(known) == len(list(names.variables(found)))
    for path, variable in names.variables(found):
        ours, theirs = np.asarray(variable.get_value()), np.asarray(known[path].get_value())
        stacked = path.startswith("layers.")
        for layer, pair in enumerate(
            zip(ours, theirs, strict=True) if stacked else [(ours, theirs)]
        ):
            assert rel_err(*pair) < bound, f"{path}, layer {layer} of its stack"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "precision"), EVERY_CASE)
def test_logits_and_losses_are_those_of_transformers(name: str, precision: str):
    known = golden.read(name)
    model = drawn_model(known.config, known.seed, PRECISIONS[precision])
    no_weight = jnp.asarray(0.0, PRECISIONS[precision])
    _, found, (main, *mtp) = outcome(model, one_document_rows(known.tokens_BT), no_weight)
    assert main.dtype == PRECISIONS[precision]
    assert rel_err(main, known.logits_BTV) < TOLERANCE[precision]
    assert len(mtp) == len(known.mtp_logits)
    for ours, theirs in zip(mtp, known.mtp_logits, strict=True):
        assert rel_err(ours, theirs) < TOLERANCE[precision]
    np.testing.assert_allclose(found, [known.loss, *known.mtp_losses], rtol=TOLERANCE[precision])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "precision"), EVERY_CASE)
def test_every_gradient_is_that_of_transformers(name: str, precision: str):
    """Of the main loss, and of the total with MTP; both are one program with another weight."""
    known = golden.read(name)
    model = drawn_model(known.config, known.seed, PRECISIONS[precision])
    batch = one_document_rows(known.tokens_BT)
    kinds = [(0.0, main_and_zeros(known))]
    if known.total_gradients:
        kinds.append((MTP_WEIGHT, known.total_gradients))
    for mtp_weight, expected in kinds:
        found, *_ = outcome(model, batch, jnp.asarray(mtp_weight, PRECISIONS[precision]))
        with jax.enable_x64(True):
            assert_same_gradients(found, in_our_layout(expected, model), TOLERANCE[precision])


@pytest.mark.parametrize(
    "name",
    ["v3_odd", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("v2_odd", "v3"))],
)
def test_packed_documents_are_those_of_the_numpy_model(name: str):
    known = golden.read(name)
    tokens_BT = np.concatenate([known.tokens_BT[:, 5:], known.tokens_BT], axis=1)
    length = tokens_BT.shape[1]
    segments_BT = np.array([[1] * 7 + [2] * (length - 7), [1] * 3 + [2] * 9 + [3] * (length - 12)])
    starts = [[0, 7], [0, 3, 12]]
    positions_BT = np.array(
        [[t - max(s for s in row if s <= t) for t in range(length)] for row in starts]
    )
    drawn = weights.draw_all(known.seed, known.config)
    expected = numpy_model.forward(known.config, drawn, tokens_BT, segments_BT, positions_BT)
    expected_logits = [expected.logits_BTV, *expected.mtp_logits]
    expected_losses = [
        numpy_model.next_token_loss(logits, tokens_BT, shift=shift, segments_BT=segments_BT)
        for shift, logits in enumerate(expected_logits, start=1)
    ]
    with jax.enable_x64(True):
        model = drawn_model(known.config, known.seed, jnp.float64)
        batch = Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens_BT, segments_BT, positions_BT)))
        logits, found = logits_and_losses(model, batch)
    for ours, theirs in zip(logits, expected_logits, strict=True):
        assert rel_err(ours, theirs) < TOLERANCE["f64"]
    np.testing.assert_allclose(found, expected_losses, rtol=TOLERANCE["f64"])


@pytest.mark.thorough
def test_remat_changes_no_gradient():
    known = golden.read("v3")
    with jax.enable_x64(True):
        model = drawn_model(known.config, known.seed, jnp.float64)
        batch = one_document_rows(known.tokens_BT)
        again, *_ = outcome(model, batch, jnp.float64(MTP_WEIGHT), remat="full")
        expected = in_our_layout(known.total_gradients, model)
        assert_same_gradients(again, expected, TOLERANCE["f64"])
