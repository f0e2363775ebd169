"""What a checkpoint is, told without its weights; every number against the published ones."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

import convert_weights
from dsjax.convert import fitting, inspecting
from dsjax.hf import complete, model_config
from tests.convert import published

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"
FP8_CONFIG = published.CONFIG | {"quantization_config": published.FP8}


def map_of(name: str) -> Path:
    path = CHECKPOINTS / f"{name}.tensors.json.gz"
    if not path.exists():
        pytest.skip(f"the published {path.name} is not beside this project")
    return path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "deepseek_r1",
            [
                # README_WEIGHTS.md and the index of the real files.
                ("total", "671,026,419,200"),
                ("active", "37,552,297,472"),
                ("MTP", "11,610,068,224"),
                ("routed experts", "F8_E4M3", "44,544", "653,908,770,816"),
                ("router", "F32", "58"),
                ("all", "91,991", "684,531,386,000", "688.6", "GB"),
            ],
        ),
        pytest.param(
            "kimi_k2",
            [
                ("total", "1,026,408,232,448"),
                ("active", "32,861,500,928"),
                ("ignored", "BF16", "61"),
                ("all", "139,644"),
            ],
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_the_real_maps(name: str, told: list[tuple], capsys: pytest.CaptureFixture):
    assert convert_weights.main(["inspect", str(map_of(name))]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in told:
        words = " ".join(row).split()
        assert any(line[: len(words)] == words for line in lines), row
    for what in ("missing", "unexpected", "wrong"):
        assert any(line[0] == what and "0" in line for line in lines if line)


def test_a_directory_and_its_index_alone_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    tensors = published.fp8(published.bf16())
    source = published.write(tmp_path / "SRC", tensors, FP8_CONFIG)
    assert convert_weights.main(["inspect", str(source)]) == 0
    whole = capsys.readouterr().out
    (all_row,) = [line for line in whole.splitlines() if line.startswith("  all ")]
    num_bytes = sum(t.nbytes for t in tensors.values())
    assert f"{len(tensors)}" in all_row and f"{num_bytes / 1000:.1f} kB" in all_row
    for file in source.glob("*.safetensors"):
        file.unlink()
    assert convert_weights.main(["inspect", str(source)]) == 0
    names_alone = capsys.readouterr().out
    assert names_alone.replace("1  331 tensors", "0  -").split() == whole.split()


@pytest.mark.parametrize("is_fp8", [False, True])
def test_an_index_of_fused_experts_alone(
    is_fp8: bool, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Names alone: what is in the files follows from config.json."""
    tensors = published.fp8(published.bf16()) if is_fp8 else published.bf16()
    fused = r"(.*\.mlp\.experts)\.\d+\.(?:(gate|up)|down)_proj\.weight"
    source = published.write(
        tmp_path / "SRC", tensors, FP8_CONFIG if is_fp8 else published.CONFIG, files=1
    )
    told = []
    for write in (False, True):
        if write:
            names = {
                re.sub(fused, lambda m: f"{m[1]}.{'gate_up' if m[2] else 'down'}_proj", name)
                for name in tensors
            }
            index = {"weight_map": dict.fromkeys(names, "absent.safetensors")}
            (source / "model.safetensors.index.json").write_text(json.dumps(index))
        assert convert_weights.main(["inspect", str(source)]) == 0
        told.append(capsys.readouterr().out.partition("against config.json")[0])
    assert told[0] == told[1]


def test_what_does_not_fit_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture):
    tensors = published.bf16()
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.indexer.weight"] = np.ones(3, np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:100]
    source = published.write(tmp_path / "SRC", tensors, published.CONFIG)
    assert convert_weights.main(["inspect", str(source)]) == 1
    told = capsys.readouterr().out
    for what, which in (
        ("missing", "lm_head.weight"),
        ("unexpected", "model.layers.0.self_attn.indexer.weight"),
        ("wrong shape", "model.norm.weight is (100,), not (136,)"),
    ):
        (line,) = [line for line in told.splitlines() if line.startswith(f"  {what} ")]
        assert line.split(None, 1 + what.count(" "))[-1].split(None, 1) == ["1", which]


SHAPES = (b'"abc"', b'[-1, "x"]', b"[1.5]", b"[%d]" % 10**30, b"[[1]]")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b'{"a": 5}', b'{"a": {"dtype": "F4"}}', b"{"),
        *(b'{"a": {"dtype": "BF16", "shape": %s}}' % shape for shape in SHAPES),
    ],
)
def test_a_file_that_is_no_map(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture):
    file, config = tmp_path / "x.tensors.json.gz", tmp_path / "config.json"
    config.write_text(json.dumps(published.CONFIG))
    for packed in (gzip.compress(content), content):
        file.write_bytes(packed)
        assert convert_weights.main(["inspect", str(file), "--config", str(config)]) == 2
        assert "x.tensors.json.gz is no map of tensor names" in capsys.readouterr().err


def test_a_map_of_impossible_sizes_is_told_all_the_same(tmp_path: Path, capsys):
    file, config = tmp_path / "x.tensors.json", tmp_path / "config.json"
    config.write_text(json.dumps(published.CONFIG))
    shape = [2**62] * 3
    file.write_text(json.dumps({"lm_head.weight": {"dtype": "BF16", "shape": shape}}))
    assert convert_weights.main(["inspect", str(file), "--config", str(config)]) == 1
    assert f"{2**186:,}" in capsys.readouterr().out


def test_parameters_by_hand():
    """Three kinds of layers, counted from the config's numbers."""
    model = model_config(published.CONFIG)
    found = inspecting.parameters(model, complete.needed(model))
    sizes = {name: t.size for name, t in published.bf16().items()}
    mtp = {name for name in sizes if name.startswith("model.layers.4.")}
    copies = {name for name in mtp if "embed_tokens" in name or "shared_head.head" in name}
    assert found["total"] == sum(n for name, n in sizes.items() if name not in mtp)
    assert found["MTP"] == sum(sizes[name] for name in mtp - copies)
    # Two layers have twelve experts, of which three are chosen.
    chosen = ("experts.0.", "experts.1.", "experts.2.")
    asleep = [n for n in sizes if ".mlp.experts." in n and not any(e in n for e in chosen)]
    assert found["active"] == found["total"] - sum(sizes[n] for n in asleep if n not in mtp)


def test_the_smallest_mesh_by_brute_force():
    weights = [
        fitting.Weight("a", 1, (64, 8), 2.0, ((), ("fsdp",)), ((), ())),
        fitting.Weight("b", 2, (2, 16, 8, 8), 2.0, _expert("fsdp"), _expert()),
        fitting.Weight("b", 2, (2, 5), 4.0, ((), ()), ((), ())),
    ]
    # At rest 1024 + 4096 + 40 bytes; of layer `b` 2048 + 20 are used at a time, of `a` 1024.
    for memory, expected in [
        (8000, (1, 1, 5160 + 2068)),
        (5000, (1, 2, 1024 + 2048 + 40 + 1024 + 20)),
        (2300, (1, 4, 1024 + 1024 + 40 + 512 + 20)),
        (1000, None),
    ]:
        found = fitting.smallest_mesh(weights, memory / fitting.FOR_WEIGHTS)
        if expected is None:
            assert found is None or found[2] <= memory
        else:
            brute = min(
                (fsdp * expert, held(fsdp, expert), fsdp, expert)
                for fsdp in (1, 2, 4, 8)
                for expert in (1, 2, 4, 8, 16)
                if held(fsdp, expert) <= memory
            )
            assert found == (brute[2], brute[3], brute[1])


def held(fsdp: int, expert: int) -> float:
    rest = 1024 / fsdp + 4096 / fsdp / expert + 40
    return rest + max(1024, 2048 / expert + 20)


def _expert(*embed: str) -> tuple[tuple[str, ...], ...]:
    return ((), ("expert",), embed, ())
