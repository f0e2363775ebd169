"""dsjax to Hugging Face: the bytes that were imported; training runs; kills, several processes."""

import dataclasses
import functools
import json
import random
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cases
import convert_weights
import exact
import weights
from dsjax import hf, sharding
from dsjax.checkpoint import RUN_FILE, Checkpoints, restore_model
from dsjax.convert.opened import open_checkpoint
from dsjax.convert.trained import InRun
from dsjax.hf import names
from dsjax.hf.tensors import whole
from dsjax.run import Checkpoint
from dsjax.run_file import to_json
from tests import drawn
from tests.convert import published
from tests.convert.forks import Forks
from tests.convert.test_import import TYPES, files_below, many_small_tensors

MTP = "model.layers.4."


def run(*arguments: object) -> int:
    return convert_weights.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint and its import."""
    folder = tmp_path_factory.mktemp("fp8")
    config = published.FEW_EXPERTS | {"quantization_config": published.FP8}
    published.write(folder / "SRC", published.fp8(published.bf16(published.FEW_EXPERTS)), config)
    assert run("import", folder / "SRC", folder / "DST") == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of a training run, and its weights under the names of `dsjax.hf.names`."""
    folder = tmp_path_factory.mktemp("trained")
    its_run = drawn.run(drawn.model(mtp_experts=True), run_dir=str(folder))
    state = drawn.state(its_run, seed=4)
    (folder / RUN_FILE).write_text(to_json(its_run))
    checkpoints = Checkpoints(folder, Checkpoint())
    checkpoints.save(7, state, {})
    checkpoints.close()
    return folder, {path: np.asarray(v.get_value()) for path, v in names.variables(state.model)}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["v2_lite", "v3_odd"])
def test_there_and_back_is_the_same_bytes(tmp_path: Path, name: str, dtype: str):
    tensors = {
        tensor: values.astype(np.float32 if tensor.endswith("bias") else TYPES[dtype])
        for tensor, values in weights.draw_all(3, cases.CASES[name]).items()
    }
    source = published.write(tmp_path / "SRC", tensors, cases.CASES[name])
    assert run("import", source, tmp_path / "DST") == 0
    assert run("export", tmp_path / "DST", tmp_path / "BACK", "--shard-size", "9kB") == 0
    published.same(published.read(tmp_path / "BACK"), tensors)
    back = json.loads((tmp_path / "BACK/config.json").read_text())
    assert back == cases.CASES[name]
    assert (tmp_path / "BACK/tokenizer.json").read_bytes() == b'{"version": "1.0"}'


def test_fp8_there_and_back_is_the_same_bytes(fp8: Path, tmp_path: Path):
    """Values, scales, and both copies of the MTP layer."""
    assert run("export", fp8 / "DST", tmp_path / "BACK") == 0
    published.same(published.read(tmp_path / "BACK"), published.read(fp8 / "SRC"))
    source, back = (
        json.loads((d / "config.json").read_text()) for d in (fp8 / "SRC", tmp_path / "BACK")
    )
    assert back == source


def test_fp8_is_exported_as_the_product_rounded_once(fp8: Path, tmp_path: Path):
    assert run("export", fp8 / "DST", tmp_path / "BACK", "--dtype", "bf16") == 0
    raw, found = published.read(fp8 / "SRC"), published.read(tmp_path / "BACK")
    for name, tensor in found.items():
        expected = raw[name]
        if name + "_scale_inv" in raw:
            expected = exact.dequantized(expected, raw[name + "_scale_inv"], exact.BF16)
            expected = expected.astype(ml_dtypes.bfloat16)
        assert tensor.tobytes() == expected.tobytes(), name
    assert len(found) == sum(not name.endswith("_scale_inv") for name in raw)
    assert "quantization_config" not in json.loads((tmp_path / "BACK/config.json").read_text())


def test_shards_begin_with_the_embedding_and_end_with_the_mtp_layer(fp8: Path, tmp_path: Path):
    assert run("export", fp8 / "DST", tmp_path / "BACK", "--shard-size", "60kB") == 0
    index = json.loads((tmp_path / "BACK/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 4
    assert index["weight_map"]["model.embed_tokens.weight"] == files[0]
    for name in ("eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight"):
        assert index["weight_map"][MTP + name] > index["weight_map"]["lm_head.weight"]
    layers = [index["weight_map"][f"model.layers.{i}.input_layernorm.weight"] for i in range(5)]
    assert layers == sorted(layers)


def test_a_run_is_exported_in_its_own_precision(trained: tuple, tmp_path: Path):
    """Every weight by hand: which slice of which array, and how it is turned."""
    folder, ours = trained
    assert run("export", folder, tmp_path / "OUT") == 0
    found = published.read(tmp_path / "OUT")
    experts = ours["layers.0.blocks.0.ffn.experts.gate_up_proj"]
    kv_b, o = (ours[f"layers.0.blocks.0.attention.{n}_proj"] for n in ("kv_b", "o"))
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for expert in range(8):
            for pair, part in enumerate(("gate", "up")):
                np.testing.assert_array_equal(
                    found[f"{prefix}mlp.experts.{expert}.{part}_proj.weight"],
                    experts[layer, expert, :, pair].T,
                )
        flat = np.concatenate([kv_b[layer, :, head].T for head in range(4)])
        np.testing.assert_array_equal(found[prefix + "self_attn.kv_b_proj.weight"], flat)
        flat = np.concatenate([o[layer, head].T for head in range(4)], axis=1)
        np.testing.assert_array_equal(found[prefix + "self_attn.o_proj.weight"], flat)
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        np.testing.assert_array_equal(
            found[f"model.layers.2.{copy}.weight"], found[f"{original}.weight"]
        )
    np.testing.assert_array_equal(found["lm_head.weight"], ours["lm_head"].T)
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(np.float32)}
    config = json.loads((tmp_path / "OUT/config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["num_nextn_predict_layers"] == 1
    its_model = open_checkpoint(folder).model
    read = dataclasses.replace(hf.model_config(config), initializer_std=its_model.initializer_std)
    assert read == its_model


def test_a_run_is_exported_in_bf16_but_for_the_router_s_bias(trained: tuple, tmp_path: Path):
    folder, _ = trained
    assert run("export", folder, tmp_path / "WIDE") == 0
    assert run("export", folder, tmp_path / "OUT", "--dtype", "bf16") == 0
    wide = published.read(tmp_path / "WIDE")
    for name, tensor in published.read(tmp_path / "OUT").items():
        if name.endswith("e_score_correction_bias"):
            assert tensor.tobytes() == wide[name].tobytes()
        else:
            assert tensor.tobytes() == wide[name].astype(ml_dtypes.bfloat16).tobytes(), name


def test_a_large_weight_of_a_run_is_stored_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A slice reads its pieces: one layer of one expert, not the stack."""
    monkeypatch.setattr("dsjax.checkpoint.PIECE_BYTES", 600)
    its_run = drawn.run(drawn.model(), run_dir=str(tmp_path))
    state = drawn.state(its_run, seed=4)
    (tmp_path / RUN_FILE).write_text(to_json(its_run))
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    checkpoints.save(1, state, {})
    checkpoints.close()
    mesh = sharding.make_mesh(expert=2, tensor=2, fsdp=2)
    restored, _ = restore_model(tmp_path, mesh)
    for one, other in zip(names.variables(restored), names.variables(state.model), strict=True):
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value(), one[0])
    tensors = open_checkpoint(tmp_path).tensors
    up = tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert isinstance(up, InRun)
    assert up._store.chunk_layout.read_chunk.shape[:2] == (1, 1)
    expected = np.asarray(state.model.layers[0].blocks[0].ffn.experts.gate_up_proj.get_value())
    np.testing.assert_array_equal(whole(up), expected[1, 5, :, 1].T)
    np.testing.assert_array_equal(up[3:7, 2:9], expected[1, 5, :, 1].T[3:7, 2:9])
    kv_b = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    # Rows 5 to 40 begin inside the first head and end inside the third.
    np.testing.assert_array_equal(kv_b[5:40, 1:3], whole(kv_b)[5:40, 1:3])


def test_an_export_killed_again_and_again_ends_as_if_never_killed(tmp_path: Path):
    source = many_small_tensors(tmp_path / "SRC")
    assert run("import", source, tmp_path / "mid") == 0
    command = ("export", tmp_path / "mid")
    shards = ("--shard-size", "20kB")
    assert run(*command, tmp_path / "one", *shards) == 0
    total = len((tmp_path / "one/.conversion/0-of-1.jsonl").read_bytes().splitlines())
    directory, rng = tmp_path / "DST", random.Random(6)
    journal = directory / ".conversion/0-of-1.jsonl"
    with Forks() as forks:
        for goal in sorted(rng.sample(range(total - total // 8), 4)):
            reached = functools.partial(lambda goal: _lines(journal) >= goal, goal)
            assert forks.killed_when(reached, *command, directory, *shards) == -9
            assert not (directory / "config.json").exists()
    assert run(*command, directory, *shards) == 0
    assert files_below(directory) == files_below(tmp_path / "one")
    published.same(published.read(directory), published.read(source))


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_two_processes_write_what_one_does(fp8: Path, tmp_path: Path):
    shards = ("--shard-size", "60kB")
    for i in (1, 0):
        assert not (tmp_path / "DST/config.json").exists()
        assert run("export", fp8 / "DST", tmp_path / "DST", "--process", f"{i}/2", *shards) == 0
    assert run("export", fp8 / "DST", tmp_path / "one", *shards) == 0
    assert files_below(tmp_path / "DST") == files_below(tmp_path / "one")


def test_a_dry_run_writes_nothing(fp8: Path, tmp_path: Path, capsys):
    assert run("export", fp8 / "DST", tmp_path / "OUT", "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("SRC", [], "is a Hugging Face directory already; `cast` changes its precision"),
        ("nowhere", [], "nowhere' is no directory"),
        ("DST", ["--scales", "ue8m0"], "--scales ue8m0 needs --dtype fp8"),
        ("DST", ["--shard-size", "large"], "'large' is no size"),
    ],
)
def test_refused(fp8: Path, tmp_path: Path, capsys, source: str, options: list, told: str):
    assert run("export", fp8 / source, tmp_path / "OUT", *options) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "OUT").exists()


def test_another_config_than_was_imported_is_refused(fp8: Path, tmp_path: Path, capsys):
    shutil.copytree(fp8 / "DST", tmp_path / "DST")
    config = json.loads((tmp_path / "DST/hub/config.json").read_text())
    (tmp_path / "DST/hub/config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1}))
    assert run("export", tmp_path / "DST", tmp_path / "OUT") == 2
    assert "describes another model than" in capsys.readouterr().err
