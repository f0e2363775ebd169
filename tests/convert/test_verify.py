"""Two checkpoints are the same model, or the first difference is named."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert_weights
from dsjax.convert.models import differing_field
from dsjax.convert.verifying import difference
from dsjax.hf import model_config
from tests.convert import published

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
FP8_CONFIG = published.FEW_EXPERTS | {"quantization_config": published.FP8}


def run(*arguments: object) -> int:
    return convert_weights.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in four forms: FP8 and its BF16 twin, as published and imported."""
    folder = tmp_path_factory.mktemp("same")
    published.write(
        folder / "fp8", published.fp8(published.bf16(published.FEW_EXPERTS)), FP8_CONFIG
    )
    assert run("cast", folder / "fp8", folder / "bf16", "--dtype", "bf16") == 0
    for name in ("fp8", "bf16"):
        assert run("import", folder / name, folder / f"{name}-imported") == 0
    return folder


FORMS = ["fp8", "bf16", "fp8-imported", "bf16-imported"]


@pytest.mark.parametrize("one", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_all_forms_of_a_model_are_the_same(folder: Path, one: str, other: str, capsys):
    assert run("verify", folder / one, folder / other) == 0
    assert "the same: " in capsys.readouterr().out


def changed_fp8(tensors: dict) -> None:
    tensors[KV_A].view(np.uint8)[5, 130] ^= 1


def changed_scale(tensors: dict) -> None:
    tensors[KV_A + "_scale_inv"][0, 1] *= 2


def changed_norm(tensors: dict) -> None:
    tensors["model.norm.weight"][7] += 1
    tensors["model.norm.weight"][3] += 4


def lost_mtp(tensors: dict) -> None:
    for name in list(tensors):
        if name.startswith("model.layers.4."):
            del tensors[name]


@pytest.mark.parametrize(
    ("change", "against", "told"),
    [
        (changed_fp8, "fp8", f"{KV_A} differs in 1 values"),
        (changed_fp8, "bf16-imported", f"{KV_A} differs in 1 values"),
        (changed_scale, "fp8-imported", f"{KV_A}_scale_inv differs in 1 values"),
        (changed_scale, "bf16", f"{KV_A} differs in 128 values"),
        (changed_norm, "fp8", "model.norm.weight differs in 2 values, by 3.99609 at [3]: "),
        (lost_mtp, "fp8", "different models: mtp are 0 and 1"),
    ],
)
def test_the_first_difference_is_named(folder, tmp_path, capsys, change, against: str, told: str):
    tensors = {name: t.copy() for name, t in published.read(folder / "fp8").items()}
    change(tensors)
    published.write(tmp_path / "other", tensors, FP8_CONFIG)
    assert run("verify", tmp_path / "other", folder / against) == 1
    assert told in capsys.readouterr().out
    assert run("verify", folder / against, tmp_path / "other") == 1


def test_another_model_is_told_by_its_first_field(folder: Path, tmp_path: Path, capsys):
    config = FP8_CONFIG | {"routed_scaling_factor": 1.0}
    published.write(tmp_path / "other", published.read(folder / "fp8"), config)
    assert run("verify", folder / "fp8", tmp_path / "other") == 1
    assert "blocks.2.ffn.router.scale is 2.5 and 1.0" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_an_error(folder: Path, tmp_path: Path, capsys):
    assert run("verify", folder / "fp8", tmp_path) == 2
    assert "config.json does not exist" in capsys.readouterr().err


def test_fields_in_which_models_differ():
    one = model_config(published.FEW_EXPERTS)
    assert differing_field(one, one) is None
    for changes, told in [
        ({"vocab_size": 41}, "vocab_size is 40 and 41"),
        ({"num_hidden_layers": 5}, "blocks are 4 and 5"),
        ({"first_k_dense_replace": 3}, "blocks.2.ffn is Moe and Dense"),
        ({"num_nextn_predict_layers": 0}, "mtp are 1 and 0"),
        ({"q_lora_rank": None}, "blocks.0.attention.q_lora_rank is 12 and None"),
    ]:
        assert differing_field(one, model_config(published.FEW_EXPERTS | changes)) == told


def test_differences_of_values():
    one = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert difference(one, one.copy()) is None
    assert difference(one, one.astype(np.float64)) is None
    assert difference(one, one.astype(ml_dtypes.bfloat16)) is None
    nan = one.copy()
    nan[2, 1] = np.nan
    assert difference(nan, nan.copy()) is None
    assert difference(nan, nan.astype(np.float64)) is None
    found = difference(one, nan)
    assert (found.count, found.place, found.size) == (1, (2, 1), np.inf)
    zero = one.copy()
    zero[0, 0] = -0.0
    found = difference(one, zero)
    assert (found.count, found.place, found.size) == (1, (0, 0), 0.0)
    # A difference that BF16 rounds away is one.
    assert difference(one + np.float32(2**-12), one.astype(ml_dtypes.bfloat16)).count == 12


@pytest.mark.parametrize("rows", [(130, 900), (900, 130)])
def test_the_largest_difference_is_found_in_any_piece(monkeypatch, rows: tuple[int, int]):
    monkeypatch.setattr("dsjax.convert.verifying.PIECE", 512)
    one = np.zeros((1000, 2), np.float32)
    other = one.copy()
    other[rows[0], 1], other[rows[1], 0] = 1, -3
    found = difference(one, other)
    assert (found.count, found.place, found.one, found.other) == (2, (rows[1], 0), 0.0, -3.0)
