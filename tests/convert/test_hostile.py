"""Damaged and malicious checkpoints: one line that names what is wrong, exit code 2, no output."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import convert_weights
from tests.convert import published

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-000003.safetensors"
SECOND = "model-00002-of-000003.safetensors"
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
EXPERT = "model.layers.2.mlp.experts.1.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = published.fp8(published.bf16())
    config = published.CONFIG | {"quantization_config": published.FP8}
    return published.write(tmp_path_factory.mktemp("whole") / "SRC", tensors, config)


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    """Links to the whole checkpoint, so that a damage replaces a link."""
    directory = tmp_path / "SRC"
    directory.mkdir()
    for path in whole.iterdir():
        (directory / path.name).symlink_to(path)
    return directory


def replace(path: Path, content: bytes | str) -> None:
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change_json(path: Path, **fields: object) -> None:
    replace(path, json.dumps(json.loads(path.read_text()) | fields))


def change_tensor(directory: Path, name: str, change: Callable) -> None:
    """`change` maps the tensor to another one, or to None for leaving it out of its file."""
    file = json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = published.read_file(directory / file)
    tensors[name] = change(tensors[name])
    (directory / file).unlink()
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / file)


def change_index(directory: Path, **places: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    kept = {name: file for name, file in (index | places).items() if file is not None}
    change_json(directory / INDEX, weight_map=kept)


def change_header(path: Path, **fields: dict) -> None:
    """Writes other fields into the header, and leaves the values where they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, values in fields.items():
        header[name] |= values
    text = json.dumps(header).encode()
    replace(path, len(text).to_bytes(8, "little") + text + content[8 + length :])


def first_tensor(path: Path) -> str:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return next(name for name in header if name != "__metadata__")


def with_nan(scales: np.ndarray) -> np.ndarray:
    scales = scales.copy()
    scales[-1, 0] = np.nan
    return scales


# Each damage to a directory, and the words that have to be told.
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated shard": (
        lambda d: replace(d / FIRST, (d / FIRST).read_bytes()[:-5]),
        [FIRST, "model.", "its values end at byte", "cut short"],
    ),
    "header longer than the file": (
        lambda d: replace(d / FIRST, (10**6).to_bytes(8, "little") + b"{}"),
        [FIRST, "a header of 1000000 bytes does not fit into 10"],
    ),
    "no header": (
        lambda d: replace(d / FIRST, b"PK\3\4 and so on, as pickles do"),
        [FIRST, "is damaged or no safetensors file"],
    ),
    "overlapping offsets": (
        lambda d: change_header(d / FIRST, **{first_tensor(d / FIRST): {"data_offsets": [2, 26]}}),
        [FIRST, first_tensor, "expected"],
    ),
    "offsets out of range": (
        lambda d: change_header(
            d / FIRST, **{first_tensor(d / FIRST): {"data_offsets": [2**60, 2**60 + 24]}}
        ),
        [FIRST, first_tensor, "its values end at byte", "of a file of"],
    ),
    "wrong dtype": (
        lambda d: change_tensor(d, "model.norm.weight", lambda t: t.astype(np.int32)),
        ["model.norm.weight", "model-0000", "is I32", "expected BF16"],
    ),
    "duplicate names in a header": (
        lambda d: replace(d / FIRST, (13).to_bytes(8, "little") + b'{"a":1,"a":2}'),
        [FIRST, "'a' stands twice"],
    ),
    "duplicate names in two shards": (
        lambda d: (
            (d / SECOND).unlink(),
            save_file(published.read_file(d / FIRST), d / SECOND),
        ),
        [SECOND, "disagree on"],
    ),
    "duplicate names in the index": (
        lambda d: replace(
            d / INDEX, '{"weight_map": {"lm_head.weight": "a", "lm_head.weight": "b"}}'
        ),
        [INDEX, "'lm_head.weight' stands twice"],
    ),
    "index names a missing file": (
        lambda d: change_index(d, **{KV_A: "model-00009.safetensors"}),
        ["model-00009.safetensors does not exist"],
    ),
    "index leaves the directory": (
        lambda d: change_index(d, **{KV_A: "../../secret.safetensors"}),
        [INDEX, "'../../secret.safetensors'", "outside"],
    ),
    "index names an absolute path": (
        lambda d: change_index(d, **{KV_A: "/etc/passwd"}),
        [INDEX, "'/etc/passwd'", "outside"],
    ),
    "index names no safetensors file": (
        lambda d: change_index(d, **{KV_A: "config.json"}),
        ["config.json is damaged or no safetensors file"],
    ),
    "index names a pipe": (
        lambda d: (os.mkfifo(d / "pipe"), change_index(d, **{KV_A: "pipe"})),
        ["pipe does not exist"],
    ),
    "index without a map": (
        lambda d: replace(d / INDEX, '{"weight_map": ["lm_head.weight"]}'),
        [INDEX, "has no weight_map"],
    ),
    "index is no JSON": (lambda d: replace(d / INDEX, '{"weight_map": '), [INDEX, "JSON"]),
    "index nested without end": (
        lambda d: replace(d / INDEX, '{"weight_map":' + "[" * 10**6),
        [INDEX, "nested too deeply"],
    ),
    "tensor not in the index": (
        lambda d: change_index(d, **{KV_A: None}),
        ["disagree on 1 tensors", KV_A],
    ),
    "missing tensor": (
        lambda d: (change_tensor(d, EXPERT, lambda t: None), change_index(d, **{EXPERT: None})),
        ["lacks 1 tensors that its config.json asks for", EXPERT],
    ),
    "missing plain tensor": (
        lambda d: (
            change_tensor(d, "lm_head.weight", lambda t: None),
            change_index(d, **{"lm_head.weight": None}),
        ),
        ["lacks 1 tensors that its config.json asks for: lm_head.weight"],
    ),
    "scales are missing": (
        lambda d: (
            change_tensor(d, KV_A + "_scale_inv", lambda t: None),
            change_index(d, **{KV_A + "_scale_inv": None}),
        ),
        ["no scales", KV_A + "_scale_inv"],
    ),
    "scales of the wrong shape": (
        lambda d: change_tensor(d, KV_A + "_scale_inv", lambda t: t[:, :1].copy()),
        [KV_A + "_scale_inv", "(1, 1)", "expected", "(1, 2)"],
    ),
    "NaN scale": (
        lambda d: change_tensor(d, EXPERT + "_scale_inv", with_nan),
        [EXPERT + "_scale_inv in /", ": [0, 0] is nan", "expected a positive number"],
    ),
    "zero scale": (
        lambda d: change_tensor(d, EXPERT + "_scale_inv", np.zeros_like),
        [EXPERT + "_scale_inv in /", ": [0, 0] is 0.0", "expected a positive number"],
    ),
    "transposed tensor": (
        lambda d: change_tensor(d, "model.layers.4.eh_proj.weight", lambda t: t.T.copy()),
        ["eh_proj.weight in /", "model-0000", "is (272, 136), not (136, 272)"],
    ),
    "config contradicts shapes": (
        lambda d: change_json(d / "config.json", moe_intermediate_size=16),
        ["another shape than config.json says", "mlp.experts.0", "not (136, 16)"],
    ),
    "config contradicts names": (
        lambda d: change_json(d / "config.json", n_routed_experts=16),
        ["lacks", "mlp.experts.12.down_proj.weight"],
    ),
    "config contradicts types": (
        lambda d: change_json(d / "config.json", quantization_config=None),
        ["FP8 weights", "no quantization_config"],
    ),
    "another quantization": (
        lambda d: change_json(
            d / "config.json", quantization_config=published.FP8 | {"weight_block_size": [64, 64]}
        ),
        ["config.json", "quantization_config.weight_block_size is [64, 64]", "[128, 128]"],
    ),
    "unknown field": (
        lambda d: change_json(d / "config.json", index_topk=2048),
        ["config.json: index_topk is 2048"],
    ),
    "config is too long": (
        lambda d: (
            replace(d / "config.json", "{}"),
            os.truncate(d / "config.json", 10**9),
        ),
        ["config.json", "1000000000 bytes, more than"],
    ),
    "pickled weights": (
        lambda d: ((d / INDEX).unlink(), (d / "pytorch_model.bin").touch()),
        ["pickled weights like pytorch_model.bin are not read"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_told_in_one_line(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    damage, words = DAMAGES[kind]
    names = [w if isinstance(w, str) else w(source / FIRST) for w in words]
    damage(source)
    code = convert_weights.main(["cast", str(source), str(tmp_path / "DST"), "--dtype", "bf16"])
    told = capsys.readouterr().err
    assert code == 2 and told.startswith("error: ") and told.count("\n") == 1
    for word in names:
        assert word in told
    assert not (tmp_path / "DST").exists()


def test_the_undamaged_one_is_taken(source: Path, tmp_path: Path):
    """So that nothing above is refused for another reason."""
    assert not convert_weights.main(["cast", str(source), str(tmp_path / "DST"), "--dtype", "bf16"])
    assert (tmp_path / "DST" / "config.json").is_file()


def test_a_weight_that_fp8_cannot_hold_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Found only when it is read: there is some output then, which nothing takes for complete."""
    tensors = published.bf16()
    tensors[EXPERT] = np.full_like(tensors[EXPERT], np.inf, dtype=ml_dtypes.bfloat16)
    source = published.write(tmp_path / "SRC", tensors, published.CONFIG)
    assert convert_weights.main(["cast", str(source), str(tmp_path / "DST"), "--dtype", "fp8"]) == 2
    assert f"{EXPERT}: it holds values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "DST" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype", "bf16", "--scales", "ue8m0"], "--scales ue8m0 needs --dtype fp8"),
        (["--dtype", "bf16", "--shard-size", "5 apples"], "'5 apples' is no size"),
        (["--dtype", "bf16", "--shard-size", "0GB"], "'0GB' is no size"),
        (["--dtype", "bf16", "--process", "2/2"], "'2/2' is no process"),
        (["--dtype", "fp8"], "SRC is fp8 already; there is nothing to cast"),
        (["--dtype", "fp8", "--scales", "ue8m0"], "are FP8 already and keep their scales"),
    ],
)
def test_options_that_mean_nothing(
    arguments: list[str], told: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert convert_weights.main(["cast", str(source), str(tmp_path / "DST"), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "DST").exists()
