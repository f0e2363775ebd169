"""FP8 to BF16 and back, directory to directory, byte for byte against NumPy in float64."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import convert_weights
import exact
from dsjax.convert import casting, opened, shards
from tests.convert import published

BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
FP8_CONFIG = published.CONFIG | {"quantization_config": published.FP8}


def run(source: Path, target: Path, *options: str) -> dict[str, np.ndarray]:
    assert convert_weights.main(["cast", str(source), str(target), *options]) == 0
    return published.read(target)


def in_bf16(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """FP8 values times scales, rounded once, by the oracle."""
    return {
        name: exact.dequantized(t, tensors[name + "_scale_inv"], exact.BF16).astype(
            ml_dtypes.bfloat16
        )
        if t.dtype == ml_dtypes.float8_e4m3fn
        else t
        for name, t in tensors.items()
        if not name.endswith("_scale_inv")
    }


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With scales that no power of two is: the quantized weights are not BF16's numbers."""
    tensors = published.fp8(published.bf16())
    return published.write(tmp_path_factory.mktemp("fp8") / "SRC", tensors, FP8_CONFIG)


def test_fp8_to_bf16(fp8: Path, tmp_path: Path):
    found = run(fp8, tmp_path / "DST", "--dtype", "bf16", "--shard-size", "100kB")
    published.same(found, in_bf16(published.read(fp8)))
    files = sorted(path.name for path in (tmp_path / "DST").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    assert json.loads((tmp_path / "DST" / "config.json").read_text()) == published.CONFIG
    tokenizer = (fp8 / "tokenizer.json").read_bytes()
    assert (tmp_path / "DST" / "tokenizer.json").read_bytes() == tokenizer


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_bf16_and_fp32_to_fp8(ue8m0: bool, wide: bool, tmp_path: Path):
    tensors = published.bf16()
    if wide:
        rng = np.random.default_rng(1)
        noise = rng.normal(1, 1e-4, 1)
        tensors = {name: (t * noise).astype(np.float32) for name, t in tensors.items()}
    source = published.write(tmp_path / "SRC", tensors, published.CONFIG)
    options = ["--scales", "ue8m0"] if ue8m0 else []
    found = run(source, tmp_path / "DST", "--dtype", "fp8", *options)
    expected = published.fp8(tensors, ue8m0=ue8m0)
    for name, t in expected.items():
        if t.dtype == np.float32 and not name.endswith(("_scale_inv", "bias")):
            expected[name] = t.astype(ml_dtypes.bfloat16)
    published.same(found, expected)
    config = json.loads((tmp_path / "DST" / "config.json").read_text())
    quantization = published.FP8 | ({"scale_fmt": "ue8m0"} if ue8m0 else {})
    assert config == published.CONFIG | {"quantization_config": quantization}


def test_scales_of_powers_of_two_make_the_whole_circle(tmp_path: Path):
    """Values times a power of two are BF16's numbers; a 448 in each block brings the scale back."""
    tensors = published.fp8(published.bf16(), ue8m0=True)
    for t in tensors.values():
        if t.dtype == ml_dtypes.float8_e4m3fn:
            t[::128, ::128] = 448
    source = published.write(tmp_path / "SRC", tensors, FP8_CONFIG)
    run(source, tmp_path / "BF16", "--dtype", "bf16")
    options = ("--dtype", "fp8", "--scales", "ue8m0")
    published.same(run(tmp_path / "BF16", tmp_path / "DST", *options), tensors)


def test_fp32_to_bf16_and_what_stays(tmp_path: Path):
    tensors = {name: t.astype(np.float32) * 1.0001 for name, t in published.bf16().items()}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    source = published.write(tmp_path / "SRC", tensors, published.CONFIG, files=1)
    found = run(source, tmp_path / "DST", "--dtype", "bf16")
    kept = {name for name, t in found.items() if t.dtype == np.float32}
    assert all(name.endswith(("bias", "inv_freq")) for name in kept) and BIAS in kept
    published.same(
        found,
        {name: t if name in kept else t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()},
    )


def test_fused_experts_come_out_one_by_one(tmp_path: Path):
    """As transformers 5 holds them."""
    tensors, fused = published.bf16(), {}
    for layer in (2, 3, 4):
        prefix, experts = f"model.layers.{layer}.mlp.experts", range(12)
        halves = [
            np.stack([tensors[f"{prefix}.{e}.{p}_proj.weight"] for e in experts])
            for p in ("gate", "up")
        ]
        fused[f"{prefix}.gate_up_proj"] = np.concatenate(halves, axis=1)
        down = [tensors[f"{prefix}.{e}.down_proj.weight"] for e in experts]
        fused[f"{prefix}.down_proj"] = np.stack(down)
    fused |= {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    source = published.write(tmp_path / "SRC", fused, published.CONFIG)
    found = run(source, tmp_path / "DST", "--dtype", "fp8")
    published.same(found, published.fp8(tensors))


def test_without_its_mtp_layer(tmp_path: Path):
    tensors = {n: t for n, t in published.bf16().items() if not n.startswith("model.layers.4.")}
    source = published.write(tmp_path / "SRC", tensors, published.CONFIG)
    published.same(run(source, tmp_path / "DST", "--dtype", "fp8"), published.fp8(tensors))


def test_processes_give_the_bytes_of_one(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ("--dtype", "bf16", "--shard-size", "50kB")
    run(fp8, tmp_path / "one", *options)
    run(fp8, tmp_path / "two", *options, "--process", "1/2")
    assert "others have not yet" in capsys.readouterr().out
    assert not (tmp_path / "two" / "config.json").exists()
    run(fp8, tmp_path / "two", *options, "--process", "0/2")
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("one", "two")
    )
    assert one == two


def test_an_unfinished_one_is_continued_and_a_finished_one_left_alone(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    options, target = ("--dtype", "bf16", "--shard-size", "100kB"), tmp_path / "DST"
    monkeypatch.setattr(shards, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert convert_weights.main(["cast", str(fp8), str(target), *options]) == 3
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert not (target / "config.json").exists()
    monkeypatch.undo()
    again = ["cast", str(target), str(tmp_path / "x"), "--dtype", "fp8"]
    assert convert_weights.main(again) == 2
    assert "DST holds an unfinished conversion; run the same" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds an unfinished conversion; run the same"):
        opened.open_checkpoint(target)
    monkeypatch.setattr(casting.fp8, "dequantize", None)  # whoever computes anew fails
    run(fp8, target, *options)
    assert f"complete: {target}" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    run(fp8, target, *options)
    assert f"{target} is complete already" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in target.iterdir()}
    # The same place for something else, or with another source, is refused.
    for other in (("--dtype", "bf16"), ("--dtype", "bf16", "--shard-size", "1kB")):
        assert convert_weights.main(["cast", str(fp8), str(target), *other]) == 2
        assert "holds another conversion: shard_size was 100000" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    run(fp8, tmp_path / "DST", "--dtype", "bf16", "--dry-run")
    told = capsys.readouterr().out
    assert "183 tensors" in told and "in 1 files" in told and "nothing was written" in told
    assert not (tmp_path / "DST").exists()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    arguments = ["cast", str(fp8), str(tmp_path / "DST"), "--dtype", "bf16", "--dry-run"]
    assert convert_weights.main(arguments) == 2
    assert "DST: the disk has 1.0 kB free" in capsys.readouterr().err


def test_no_room_leaves_the_directory_free_for_another_plan(
    fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    arguments = ["cast", str(fp8), str(tmp_path / "DST"), "--dtype", "bf16"]
    assert convert_weights.main(arguments) == 2
    assert "DST: the disk has 10 bytes free" in capsys.readouterr().err
    assert not (tmp_path / "DST").exists()


def test_the_source_is_no_target(fp8: Path, capsys: pytest.CaptureFixture):
    for command in (["cast", "--dtype", "bf16"], ["import"], ["export"]):
        name, *options = command
        assert convert_weights.main([name, str(fp8), f"{fp8}/../SRC", *options]) == 2
        assert "is the source itself; give another directory" in capsys.readouterr().err


def test_fp8_weights_keep_their_scales_and_config_says_so():
    """Norms in FP32 become BF16; nothing is quantized, so nothing is said anew."""
    ue8m0 = FP8_CONFIG | {"quantization_config": published.FP8 | {"scale_fmt": "ue8m0"}}
    for config, asked in ((ue8m0, False), (ue8m0, True), (FP8_CONFIG, False)):
        assert casting.recast_config(config, "fp8", ue8m0=asked) == config
    with pytest.raises(ValueError, match=r"are FP8 already and keep their scales.*bf16 first"):
        casting.recast_config(FP8_CONFIG, "fp8", ue8m0=True)


def test_both_names_of_the_type_are_changed():
    config = published.CONFIG | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    found = casting.recast_config(config, "fp32")
    assert found == config | {"dtype": "float32", "torch_dtype": "float32"}


def test_memory_is_that_of_pieces(fp8: Path):
    """Not even a slice of a quantized weight reads more than the blocks it touches."""
    read = []

    class Watched:
        shape, dtype = (500, 300), np.dtype(np.float32)

        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            read.append([(part.start, part.stop) for part in index])
            return np.ones([part.stop - part.start for part in index], np.float32)

    name = "model.layers.0.self_attn.q_a_proj.weight"
    cast = casting.recast({name: Watched()}, "fp8")
    values = cast[name][slice(130, 140), slice(100, 200)]
    assert values.shape == (10, 100) and read == [[(128, 256), (0, 256)]]
    read.clear()
    scales = cast[name + "_scale_inv"][slice(2, 4), slice(0, 3)]
    assert scales.shape == (2, 3) and read == [[(256, 384), (0, 300)], [(384, 500), (0, 300)]]


def test_what_is_not_fp8_yet_gets_scales_of_the_kind_that_are_there(tmp_path: Path):
    """A checkpoint with scales that are powers of two, and one weight still in BF16."""
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    wide = published.bf16()
    whole = published.fp8(wide, ue8m0=True)
    mixed = {k: t for k, t in whole.items() if not k.startswith(name)} | {name: wide[name]}
    config = published.CONFIG | {
        "quantization_config": published.FP8 | {"scale_fmt": "ue8m0"},
    }
    published.write(tmp_path / "SRC", mixed, config)
    published.same(run(tmp_path / "SRC", tmp_path / "DST", "--dtype", "fp8"), whole)
