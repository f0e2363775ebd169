"""The NumPy model and transformers, written independently, agree; wrong models do not."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import cases
import golden
import numpy_model
import weights

# Both sides are float64 and differ in summation order over at most a few hundred terms:
# about 1e-15 was seen, and any mistake in the model shows at 1e-4 or more.
SAME = 1e-12
WRONG = 1e-4
CHECKPOINTS = pathlib.Path(__file__).parents[3] / "shared" / "checkpoints"


def rel_err(actual: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius error relative to the expected array, in float64."""
    assert actual.shape == expected.shape
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    return float(difference / np.linalg.norm(expected))


def losses(config: dict, drawn: dict, tokens_BT: np.ndarray) -> tuple[float, list[float]]:
    """The main loss and one for every MTP depth."""
    result = numpy_model.forward(config, drawn, tokens_BT)
    mtp = [
        numpy_model.next_token_loss(logits, tokens_BT, shift=depth + 1)
        for depth, logits in enumerate(result.mtp_logits, start=1)
    ]
    return numpy_model.next_token_loss(result.logits_BTV, tokens_BT), mtp


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_and_losses_are_those_of_transformers(name: str):
    known = golden.read(name)
    drawn = weights.draw_all(known.seed, known.config)
    result = numpy_model.forward(known.config, drawn, known.tokens_BT)
    assert known.config == cases.CASES[name]
    assert rel_err(result.logits_BTV, known.logits_BTV) < SAME
    assert len(known.mtp_logits) == known.config.get("num_nextn_predict_layers", 0)
    for found, expected in zip(result.mtp_logits, known.mtp_logits, strict=True):
        assert rel_err(found, expected) < SAME
    loss, mtp = losses(known.config, drawn, known.tokens_BT)
    np.testing.assert_allclose([loss, *mtp], [known.loss, *known.mtp_losses], rtol=SAME)


@pytest.mark.parametrize("name", cases.CASES)
def test_the_widened_transformers_is_the_shipped_one(name: str):
    known = golden.read(name)
    assert known.logits_f32_unpatched.dtype == np.float32
    assert rel_err(known.logits_f32_unpatched, known.logits_BTV) < 1e-5


@pytest.mark.parametrize("name", cases.CASES)
def test_gradients_are_slopes_of_the_numpy_loss(name: str):
    """Every gradient at once, along one random direction, by a difference of five points.

    Rounding leaves about 1e-16 / 1e-6 of the loss. Two points would not do: the direction is some
    hundred long, and the third derivative grows with its cube.
    """
    known = golden.read(name)
    drawn = weights.draw_all(known.seed, known.config)
    rng = np.random.default_rng(0)
    for kept, gradients in ((0.0, known.gradients), (0.3, known.total_gradients)):
        if not gradients:
            assert not len(known.mtp_losses)
            continue
        along = {k: rng.normal(size=g.shape) for k, g in gradients.items()}

        def total(step: float, kept: float = kept, along: dict = along) -> float:
            moved = {
                k: w + step * along[weights.shared_name(k)]
                if weights.shared_name(k) in along
                else w
                for k, w in drawn.items()
            }
            loss, mtp = losses(known.config, moved, known.tokens_BT)
            return loss + kept * float(np.mean(mtp or [0.0]))

        near, far = (total(h) - total(-h) for h in (1e-6, 2e-6))
        slope = (8 * near - far) / 12e-6
        expected = sum(float((g * along[k]).sum()) for k, g in gradients.items())
        assert slope == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", cases.CASES)
def test_every_parameter_has_a_gradient_of_its_shape(name: str):
    known = golden.read(name)
    shapes = weights.tensor_shapes(known.config)
    trained = {
        n: shape
        for n, shape in shapes.items()
        if weights.shared_name(n) == n and not n.endswith("e_score_correction_bias")
    }
    last = known.config["num_hidden_layers"]
    in_mtp = [n for n in trained if ".layers." in n and int(n.split(".")[2]) >= last]
    main = {n: shape for n, shape in trained.items() if n not in in_mtp}
    assert {n: g.shape for n, g in known.gradients.items()} == main
    if known.total_gradients:
        assert {n: g.shape for n, g in known.total_gradients.items()} == trained


YARN, YARN_ODD = (cases.CASES[name]["rope_scaling"] for name in ("v3", "v2_odd"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("v2_lite", {"norm_topk_prob": True}),
        ("v2", {"topk_method": "greedy"}),
        ("v2", {"routed_scaling_factor": 1.0}),
        ("v2_odd", {"rope_scaling": YARN_ODD | {"mscale_all_dim": 1.0}}),
        ("v2_odd", {"rope_scaling": YARN_ODD | {"mscale": 0.8, "mscale_all_dim": 0.8}}),
        ("v3", {"rope_scaling": None}),
        ("v3", {"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}}),
        ("v3", {"rope_scaling": YARN | {"beta_fast": 4}}),
        ("v3", {"rope_scaling": YARN | {"beta_slow": 8}}),
        ("v3", {"n_group": 1, "topk_group": 1}),
        ("kimi_k2", {"rope_theta": 10000}),
        ("v3_odd", {"norm_topk_prob": True}),
        ("v3_dense", {"topk_group": 2}),
    ],
)
def test_the_goldens_tell_a_wrong_switch(name: str, change: dict):
    known = golden.read(name)
    drawn = weights.draw_all(known.seed, known.config)
    wrong = numpy_model.forward(known.config | change, drawn, known.tokens_BT)
    assert rel_err(wrong.logits_BTV, known.logits_BTV) > WRONG


def test_the_goldens_tell_a_forgotten_bias_and_a_swapped_projection():
    known = golden.read("v3")
    drawn = weights.draw_all(known.seed, known.config)
    for name, tensor in drawn.items():
        if name.endswith("eh_proj.weight"):
            drawn[name] = np.roll(tensor, tensor.shape[1] // 2, axis=1)
    swapped = numpy_model.forward(known.config, drawn, known.tokens_BT)
    assert rel_err(swapped.logits_BTV, known.logits_BTV) < SAME
    assert rel_err(swapped.mtp_logits, known.mtp_logits) > WRONG
    for name, tensor in drawn.items():
        if name.endswith("e_score_correction_bias"):
            drawn[name] = np.zeros_like(tensor)
    unbiased = numpy_model.forward(known.config, drawn, known.tokens_BT)
    assert rel_err(unbiased.logits_BTV, known.logits_BTV) > WRONG


def test_a_tie_goes_to_the_lower_index():
    config = cases.CASES["v3"]  # 4 groups of 3, 2 kept, 3 chosen
    score, chosen, weight = numpy_model.choose(config, np.zeros(12), np.zeros(12))
    assert chosen == [0, 1, 2]
    np.testing.assert_allclose(score, 0.5)
    np.testing.assert_allclose(weight, 2.5 / 3)
    logits = np.zeros(12)
    logits[[7, 10]] = 1.0  # groups 2 and 3 win; 6, 8, 9 and 11 tie for third place
    assert numpy_model.choose(config, logits, np.zeros(12))[1] == [7, 10, 6]


def test_groups_follow_their_version_of_the_score():
    """V2 looks at the best expert of a group, V3 at the sum of its two best; masked is never in."""
    logits = np.array([3.0, -9.0, 2.0, 2.0])
    v2 = cases.CASES["v2"] | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 1}
    v3 = cases.CASES["v3"] | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    assert numpy_model.choose(v2, logits, None)[1] == [0]
    assert numpy_model.choose(v3, logits, np.zeros(4))[1] == [2, 3]
    assert numpy_model.choose(v3, logits, np.full(4, -2.0))[1] == [2, 3]


def test_packed_documents_do_not_see_each_other():
    known = golden.read("v3_odd")
    drawn = weights.draw_all(known.seed, known.config)
    tokens_BT = known.tokens_BT[:1]
    whole = numpy_model.forward(known.config, drawn, tokens_BT)
    packed = numpy_model.forward(
        known.config,
        drawn,
        np.concatenate([tokens_BT[:, 7:], tokens_BT], axis=1),
        segments_BT=np.array([[1] * 5 + [2] * 12]),
        positions_BT=np.array([[*range(5), *range(12)]]),
    )
    assert rel_err(packed.logits_BTV[:, 5:], whole.logits_BTV) < SAME
    assert rel_err(packed.mtp_logits[:, :, 5:], whole.mtp_logits) < SAME
    alone = numpy_model.forward(known.config, drawn, tokens_BT[:, 7:])
    assert rel_err(packed.logits_BTV[:, :5], alone.logits_BTV) < SAME
    together = np.concatenate([tokens_BT[:, 7:], tokens_BT], axis=1)
    segments_BT = np.array([[1] * 5 + [2] * 12])
    found = numpy_model.next_token_loss(packed.logits_BTV, together, segments_BT=segments_BT)
    first = numpy_model.next_token_loss(alone.logits_BTV, tokens_BT[:, 7:])
    second = numpy_model.next_token_loss(whole.logits_BTV, tokens_BT)
    assert found == pytest.approx((4 * first + 11 * second) / 15, rel=SAME)


@pytest.mark.parametrize(
    ("theta", "yarn", "known"),
    [
        (10000, {}, {0: 1.0, 9: 0.0749894209, 16: 5.5e-3, 20: 7.90569415e-4, 31: 3.33380358e-6}),
        (
            50000.0,
            {"beta_fast": 1.0, "factor": 32.0},
            {0: 1.0, 16: 4.47213595e-3, 20: 3.61404677e-5, 31: 8.76441291e-7},
        ),
    ],
)
def test_yarn_frequencies_at_published_size(theta: float, yarn: dict, known: dict):
    config = {
        "qk_rope_head_dim": 64,
        "rope_theta": theta,
        "rope_scaling": YARN | yarn,
    }
    frequencies = numpy_model.rotary_frequencies(config)
    np.testing.assert_allclose(frequencies[list(known)], list(known.values()), rtol=1e-7)


def test_softmax_scale_at_published_size():
    config = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": YARN}
    assert numpy_model.softmax_scale(config) == pytest.approx(0.1352337789, rel=1e-9)
    assert numpy_model.softmax_scale(config | {"rope_scaling": None}) == 192**-0.5


@pytest.mark.parametrize("model", ["deepseek_r1", "kimi_k2"])
def test_tensor_names_are_the_published_ones(model: str):
    path = CHECKPOINTS / f"{model}.config.json"
    if not path.exists():
        pytest.skip(f"the published tensor list of {model} is not beside this project")
    with gzip.open(CHECKPOINTS / f"{model}.tensors.json.gz") as file:
        published = json.load(file)
    beside_the_weights = ("weight_scale_inv", "rotary_emb.inv_freq")
    expected = {
        name: tuple(tensor["shape"])
        for name, tensor in published.items()
        if not name.endswith(beside_the_weights)
    }
    assert weights.tensor_shapes(json.loads(path.read_text())) == expected


@pytest.mark.parametrize("name", ["v2_lite", "v3"])
def test_saved_directories_hold_the_drawn_weights(name: str):
    known = golden.read(name)
    found = {}
    for file in (golden.directory() / name).glob("*.safetensors"):
        found |= load_file(file)
    drawn = weights.draw_all(known.seed, known.config)
    assert found.keys() == drawn.keys()
    for tensor, values in drawn.items():
        np.testing.assert_array_equal(found[tensor], values.astype(np.float32))
