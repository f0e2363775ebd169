"""What is not whole is neither made nor taken for a checkpoint."""

import json
from pathlib import Path

import ml_dtypes
import pytest

import convert_weights
from dsjax.checkpoint import CHECKPOINTS, RUN_FILE, latest_model
from dsjax.run_file import load, to_json
from tests.convert import published

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> int:
    return convert_weights.main([str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published.write(tmp_path / "SRC", published.bf16(), published.CONFIG)


def without(tmp_path: Path, *gone: str, name: str) -> Path:
    tensors = {k: t for k, t in published.bf16().items() if not k.startswith(gone)}
    return published.write(tmp_path / name, tensors, published.CONFIG)


@pytest.mark.parametrize("gone", ["model.norm.weight", "lm_head.weight"])
def test_two_checkpoints_that_lack_the_same_tensor_are_not_the_same(gone, tmp_path, capsys):
    one, other = (without(tmp_path, gone, name=name) for name in "AB")
    assert run("verify", one, other) == 2
    told = capsys.readouterr().err
    assert f"{one}: the checkpoint lacks" in told and gone in told


def test_a_checkpoint_without_its_mtp_layer_is_its_import(tmp_path, capsys):
    bare = without(tmp_path, "model.layers.4.", name="SRC")
    assert run("import", bare, tmp_path / "DST") == 0
    assert run("verify", bare, tmp_path / "DST") == 0, capsys.readouterr().out


def test_scales_of_two_types_in_one_weight_are_refused(tmp_path, capsys):
    tensors = published.fp8(published.bf16(), ue8m0=True)
    name = "model.layers.2.mlp.experts.1.down_proj.weight_scale_inv"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e8m0fnu)
    config = published.CONFIG | {"quantization_config": published.FP8}
    assert run("import", published.write(tmp_path / "SRC", tensors, config), tmp_path / "DST") == 2
    assert f"{name} is float8_e8m0fnu but" in capsys.readouterr().err
    assert not (tmp_path / "DST").exists()


def test_a_chunk_that_is_gone_is_made_again_before_the_marker(source, tmp_path):
    target = tmp_path / "DST"
    assert run("import", source, target, "--process", "0/2") == 0
    chunk = next(path for path in sorted(target.glob("model/*/c/**/*")) if path.is_file())
    content = chunk.read_bytes()
    chunk.unlink()
    assert run("import", source, target, "--process", "1/2") == 2
    assert not (target / "dsjax.json").exists()
    assert run("import", source, target, "--process", "0/2") == 0
    assert chunk.read_bytes() == content
    assert json.loads((target / "dsjax.json").read_text())["tensors"]


def test_looking_for_weights_makes_no_folder(tmp_path):
    (tmp_path / RUN_FILE).write_text(to_json(load(ROOT / "tests" / "micro_run.py")))
    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        latest_model(tmp_path)
    assert not (tmp_path / CHECKPOINTS).exists()
