"""Hugging Face to dsjax: exact, whole or refused, in parts, by several processes, killed."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cases
import convert_weights
import exact
import weights
from dsjax import cli, from_pretrained, sharding
from dsjax.convert import importing
from dsjax.convert.opened import open_checkpoint
from dsjax.hf import names
from dsjax.hf.tensors import whole
from dsjax.model import Transformer
from tests.convert import published
from tests.convert.forks import Forks
from tests.drawn import FAST_COMPILE
from tests.test_generate import tokenizer_of

ROOT = Path(__file__).parents[2]
MTP = "model.layers.4."
COPIES = {MTP + "embed_tokens.weight", MTP + "shared_head.head.weight"}
TYPES = {"bf16": ml_dtypes.bfloat16, "fp32": np.float32}


def drawn(name: str, dtype: np.dtype) -> dict[str, np.ndarray]:
    config = cases.CASES[name]
    return {
        tensor: values.astype(np.float32 if tensor.endswith("bias") else dtype)
        for tensor, values in weights.draw_all(3, config).items()
    }


def stored(directory: Path) -> dict[str, np.ndarray]:
    return {name: whole(tensor) for name, tensor in open_checkpoint(directory).tensors.items()}


def without_copies(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in tensors.items() if name not in COPIES}


def files_below(directory: Path) -> dict[str, bytes]:
    """What is in `directory`, but for the journal, which differs from one way to the other."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".conversion" not in path.parts
    }


def run(*arguments: object) -> int:
    return convert_weights.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bf16") / "SRC"
    return published.write(directory, published.bf16(published.FEW_EXPERTS), published.FEW_EXPERTS)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = published.FEW_EXPERTS | {"quantization_config": published.FP8}
    directory = tmp_path_factory.mktemp("fp8") / "SRC"
    return published.write(directory, published.fp8(published.bf16(published.FEW_EXPERTS)), config)


@pytest.fixture(scope="module")
def imported(fp8: Path) -> Path:
    """The import of `fp8` by a single process that nothing interrupts."""
    assert run("import", fp8, fp8.parent / "DST") == 0
    return fp8.parent / "DST"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["v2_lite", "v2_odd", "v3_odd", "kimi_k2"])
def test_every_byte_arrives(tmp_path: Path, name: str, dtype: str):
    tensors = drawn(name, TYPES[dtype])
    if name == "kimi_k2":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    source = published.write(tmp_path / "SRC", tensors, cases.CASES[name], files=2)
    assert run("import", source, tmp_path / "DST") == 0
    copies = {copy for copy in tensors if copy.endswith(("head.head.weight", "inv_freq"))}
    copies |= {copy for copy in tensors if copy.endswith("embed_tokens.weight")}
    copies -= {"model.embed_tokens.weight"}
    published.same(stored(tmp_path / "DST"), {n: t for n, t in tensors.items() if n not in copies})
    assert json.loads((tmp_path / "DST/hub/config.json").read_text()) == cases.CASES[name]
    assert (tmp_path / "DST/hub/tokenizer.json").read_bytes() == b'{"version": "1.0"}'


def test_fp8_stays_as_it_is_and_copies_are_stored_once(fp8: Path, imported: Path):
    published.same(stored(imported), without_copies(published.read(fp8)))
    values = sum(t.nbytes for t in without_copies(published.read(fp8)).values())
    chunks = sum(p.stat().st_size for p in (imported / "model").glob("*/c/**/*") if p.is_file())
    assert chunks == values


@pytest.mark.parametrize("dtype", TYPES)
def test_fp8_becomes_the_product_rounded_once(fp8: Path, tmp_path: Path, dtype: str):
    assert run("import", fp8, tmp_path / "DST", "--dtype", dtype) == 0
    raw, found = published.read(fp8), stored(tmp_path / "DST")
    kinds = {"bf16": exact.BF16, "fp32": exact.F32}
    assert found.keys() == {n for n in without_copies(raw) if not n.endswith("_scale_inv")}
    for name, tensor in found.items():
        expected = raw[name]
        if name + "_scale_inv" in raw:
            expected = exact.dequantized(expected, raw[name + "_scale_inv"], kinds[dtype])
        wide = np.float32 if name.endswith("bias") else TYPES[dtype]
        assert tensor.dtype == wide
        assert tensor.tobytes() == expected.astype(wide).tobytes(), name


def test_bf16_becomes_fp8_as_published(bf16: Path, fp8: Path, tmp_path: Path):
    assert run("import", bf16, tmp_path / "DST", "--dtype", "fp8") == 0
    published.same(stored(tmp_path / "DST"), without_copies(published.read(fp8)))
    config = json.loads((tmp_path / "DST/hub/config.json").read_text())
    assert config["quantization_config"] == published.FP8


def test_an_fp8_checkpoint_computes_what_its_dequantized_twin_does(
    fp8: Path, imported: Path, tmp_path: Path
):
    raw = published.read(fp8)
    twin = {
        name: exact.dequantized(tensor, raw[name + "_scale_inv"], exact.BF16)
        if name + "_scale_inv" in raw
        else tensor
        for name, tensor in raw.items()
        if not name.endswith("_scale_inv")
    }
    model = from_pretrained(imported)
    expected = from_pretrained(published.write(tmp_path / "TWIN", twin, published.FEW_EXPERTS))
    for (path, one), (_, other) in zip(
        names.variables(model), names.variables(expected), strict=True
    ):
        assert one.get_value().dtype == other.get_value().dtype, path
        np.testing.assert_array_equal(one.get_value(), other.get_value(), path)
    run_model = jax.jit(Transformer.__call__, compiler_options=FAST_COMPILE)
    tokens_BT = jnp.arange(6, dtype=jnp.int32)[None]
    logits, its = (np.asarray(run_model(m, tokens_BT), np.float32) for m in (model, expected))
    assert np.isfinite(logits).all() and np.ptp(logits) > 1
    np.testing.assert_array_equal(logits, its)


@pytest.mark.parametrize(
    ("options", "kept", "mtp", "dense"),
    [
        (["--layers", "0:3"], {0: 0, 1: 1, 2: 2}, False, 2),
        (["--layers", "1:3", "--mtp"], {1: 0, 2: 1, 4: 2}, True, 1),
        (["--layers", "3:4"], {3: 0}, False, 0),
        (["--no-mtp"], {0: 0, 1: 1, 2: 2, 3: 3}, False, 2),
    ],
)
def test_a_part_of_a_checkpoint(
    fp8: Path, tmp_path: Path, options: list, kept: dict, mtp: bool, dense: int
):
    assert run("import", fp8, tmp_path / "DST", *options) == 0
    expected = {}
    for name, tensor in without_copies(published.read(fp8)).items():
        *_, layer, inside = ["", *name.partition("model.layers.")]
        number, _, rest = inside.partition(".")
        if not layer:
            expected[name] = tensor
        elif int(number) in kept:
            expected[f"model.layers.{kept[int(number)]}.{rest}"] = tensor
    published.same(stored(tmp_path / "DST"), expected)
    config = json.loads((tmp_path / "DST/hub/config.json").read_text())
    assert config["num_hidden_layers"] == len(kept) - mtp
    assert config["first_k_dense_replace"] == dense
    assert config["num_nextn_predict_layers"] == int(mtp)
    assert len(from_pretrained(tmp_path / "DST").mtp) == int(mtp)


def test_several_processes_make_the_same_files(fp8: Path, imported: Path, tmp_path: Path, capsys):
    for i in (1, 0, 2):
        assert not (tmp_path / "DST/dsjax.json").exists()
        assert run("import", fp8, tmp_path / "DST", "--process", f"{i}/3") == 0
    assert capsys.readouterr().out.count("others have not yet") == 2
    assert files_below(tmp_path / "DST") == files_below(imported)
    journals = [(tmp_path / f"DST/.conversion/{i}-of-3.jsonl").read_bytes() for i in range(3)]
    units = [[json.loads(line)["unit"] for line in lines.splitlines()] for lines in journals]
    every = [unit for its in units for unit in its]
    assert len(every) == len(set(every)), "a unit was done twice"
    loads = [sum((tmp_path / "DST" / file).stat().st_size for file in its[:-1]) for its in units]
    assert max(loads) < 1.2 * min(loads)


DISTRIBUTED = """
import sys
import jax
import convert_weights

jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.exit(convert_weights.main([*sys.argv[3:], "--process", "jax"]))
"""


def test_two_processes_under_jax_distributed_make_the_same_files(
    fp8: Path, imported: Path, tmp_path: Path
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", DISTRIBUTED, address]
    both = [
        subprocess.Popen([*command, str(i), "import", str(fp8), str(tmp_path / "DST")], cwd=ROOT)
        for i in (0, 1)
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    assert files_below(tmp_path / "DST") == files_below(imported)
    assert len(list((tmp_path / "DST/.conversion").glob("*-of-2.jsonl"))) == 2


def test_experts_held_in_one_tensor_are_imported_one_by_one(bf16: Path, tmp_path: Path):
    """As transformers 5 holds them in memory: gate above up, expert by expert."""
    tensors = published.read(bf16)
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in (2, 3, 4):
        prefix = f"model.layers.{layer}.mlp.experts"
        part = {
            kind: np.stack([tensors[f"{prefix}.{e}.{kind}_proj.weight"] for e in range(4)])
            for kind in ("gate", "up", "down")
        }
        fused[f"{prefix}.gate_up_proj"] = np.concatenate([part["gate"], part["up"]], axis=1)
        fused[f"{prefix}.down_proj"] = part["down"]
    source = published.write(tmp_path / "SRC", fused, published.FEW_EXPERTS)
    assert run("import", source, tmp_path / "DST") == 0
    published.same(stored(tmp_path / "DST"), without_copies(tensors))


def many_small_tensors(directory: Path) -> Path:
    """Enough tensors that an import takes a while, though it has few bytes."""
    config = cases.CASES["v3"] | {"n_routed_experts": 80, "hidden_size": 8, "n_group": 4}
    tensors = {
        name: tensor.astype(np.float32) for name, tensor in weights.draw_all(1, config).items()
    }
    return published.write(directory, tensors, config)


def test_killed_ten_times_it_ends_as_if_never_killed(tmp_path: Path):
    """The kills come at random moments of the work, told by the journal that grows."""
    source = many_small_tensors(tmp_path / "SRC")
    assert run("import", source, tmp_path / "one") == 0
    total = len((tmp_path / "one/.conversion/0-of-1.jsonl").read_bytes().splitlines()) - 1
    directory, rng = tmp_path / "DST", random.Random(5)
    journal = directory / ".conversion/0-of-1.jsonl"
    recorded, codes = [], []
    with Forks() as forks:
        for goal in sorted(rng.sample(range(total - total // 8), 10)):
            reached = functools.partial(lambda goal: _lines(journal) >= goal, goal)
            codes.append(forks.killed_when(reached, "import", source, directory))
            recorded.append(_lines(journal))
            assert not (directory / "dsjax.json").exists()
            with pytest.raises(ValueError, match="unfinished import"):
                open_checkpoint(directory)
    assert codes == [-9] * 10 and recorded == sorted(recorded)
    assert run("import", source, directory) == 0
    assert files_below(directory) == files_below(tmp_path / "one")
    units = [json.loads(line)["unit"] for line in journal.read_bytes().splitlines()]
    # What was recorded before a kill is never done again.
    assert len(units) == len(set(units)) == total + 1


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize("damage", ["other bytes", "missing", "half"])
def test_a_recorded_chunk_that_is_not_as_recorded_is_made_again(
    fp8: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    """As a machine that lost its power leaves it: the journal knows more than the disk."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importing, "finish", stopped)
        patch.setattr(os, "sync", stopped)
        assert run("import", fp8, tmp_path / "DST") == 3
    chunk = tmp_path / "DST/model/lm_head/c/0/0"
    match damage:
        case "other bytes":
            chunk.write_bytes(bytes(chunk.stat().st_size))
        case "missing":
            chunk.unlink()
        case "half":
            chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    assert run("import", fp8, tmp_path / "DST") == 0
    assert files_below(tmp_path / "DST") == files_below(imported)


def test_the_marker_comes_last(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the last write is, before it the directory is refused, after it complete."""
    writes = []
    replace = os.replace

    def watched(partial, path) -> None:
        assert not (tmp_path / "DST/dsjax.json").exists()
        writes.append(Path(path).relative_to(tmp_path / "DST"))
        replace(partial, path)

    monkeypatch.setattr(os, "replace", watched)
    assert run("import", fp8, tmp_path / "DST") == 0
    assert writes[-1] == Path("dsjax.json")
    assert Path("hub/config.json") in writes and Path("model/embed/c/0/0") in writes


def test_a_full_disk_is_one_error_and_the_same_command_continues(
    bf16: Path, tmp_path: Path, capsys
):
    """A limit on the size of files, which the operating system enforces, stands for the disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert run("import", bf16, tmp_path / "DST") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    error = capsys.readouterr().err
    assert "what is finished stays, the same command continues" in error
    assert f"error: {tmp_path}/DST/model/" in error and error.count("\n") == 1
    assert run("import", bf16, tmp_path / "DST") == 0
    assert "are there already" in capsys.readouterr().out
    published.same(stored(tmp_path / "DST"), without_copies(published.read(bf16)))


def test_too_little_room_is_told_before_anything_is_written(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert run("import", fp8, tmp_path / "DST") == 2
    assert "the disk has 1.0 kB free, " in capsys.readouterr().err
    assert not (tmp_path / "DST").exists()


def test_a_dry_run_writes_nothing(fp8: Path, tmp_path: Path, capsys):
    assert run("import", fp8, tmp_path / "DST", "--dry-run") == 0
    told = capsys.readouterr().out
    assert f"{len(without_copies(published.read(fp8))):,} tensors" in told
    assert "nothing was written" in told and not (tmp_path / "DST").exists()


def test_what_is_complete_is_left_alone(fp8: Path, imported: Path, capsys):
    times = {p: p.stat().st_mtime_ns for p in imported.rglob("*")}
    assert run("import", fp8, imported) == 0
    assert "is complete already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in imported.rglob("*")} == times
    assert run("import", fp8, imported, "--dtype", "bf16") == 2
    assert "holds another conversion" in capsys.readouterr().err


REFUSED = [
    (["--layers", "2:9"], None, "layers 2:9 were asked for, but the model has 4"),
    (["--layers", "4"], None, "layers are '4'; write FIRST:END"),
    (["--process", "2/2"], None, "'2/2' is no process"),
    ([], {MTP + "embed_tokens.weight": np.zeros((40, 136), ml_dtypes.bfloat16)}, "differs from"),
    ([], {"model.layers.9.x.weight": np.zeros(2, np.float32)}, "no place for: model.layers.9.x"),
    ([], {"model.norm.weight": None}, "asks for: model.norm.weight"),
    (
        ["--dtype", "bf16"],
        {"model.layers.0.mlp.up_proj.weight_scale_inv": np.full((3, 2), np.nan, np.float32)},
        "[0, 0] is nan, expected a positive number",
    ),
]


@pytest.mark.parametrize(("options", "changes", "told"), REFUSED)
def test_refused_before_anything_is_written(
    tmp_path: Path, capsys, options: list, changes: dict | None, told: str
):
    tensors = published.fp8(published.bf16(published.FEW_EXPERTS)) | (changes or {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    config = published.FEW_EXPERTS | {"quantization_config": published.FP8}
    source = published.write(tmp_path / "SRC", tensors, config)
    assert run("import", source, tmp_path / "DST", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error
    assert not (tmp_path / "DST").exists()


def test_without_its_mtp_layer_it_is_imported_without(tmp_path: Path, capsys):
    tensors = {
        n: t for n, t in published.bf16(published.FEW_EXPERTS).items() if not n.startswith(MTP)
    }
    source = published.write(tmp_path / "SRC", tensors, published.FEW_EXPERTS)
    assert run("import", source, tmp_path / "DST", "--mtp") == 2
    assert "holds no MTP layer" in capsys.readouterr().err
    assert run("import", source, tmp_path / "DST") == 0
    assert from_pretrained(tmp_path / "DST").config.mtp == ()


def test_the_command_line_finds_tokenizer_and_end_of_text_in_an_import(
    golden_dir: Path, tmp_path: Path
):
    source = Path(shutil.copytree(golden_dir / "v2_lite", tmp_path / "SRC"))
    (source / "tokenizer.json").write_text(tokenizer_of(38))
    assert run("import", source, tmp_path / "DST") == 0
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (model, tokenizer, ends), (its_model, its_tokenizer, its_ends) = (
        cli._from_hub(str(path), mesh, None)[:3] for path in (source, tmp_path / "DST")
    )
    assert ends == its_ends == {1}
    assert list(its_tokenizer.encode_prompt("2:8")) == [2, 10, 8]
    assert list(tokenizer.encode_prompt("2:8")) == [2, 10, 8]
    for one, other in zip(names.variables(model), names.variables(its_model), strict=True):
        np.testing.assert_array_equal(one[1].get_value(), other[1].get_value(), one[0])
