"""transformers writes, we import and export, transformers reads: the same logits at every station.

Runs where fresh goldens are tested (`make parity`), because it needs torch.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cases
import convert_weights
import exact
import golden
from dsjax import from_pretrained
from tests.convert import published
from tests.test_parity import logits_and_losses, one_document_rows
from tests.tolerance import TOLERANCE, rel_err

HERE = Path(__file__).parent
ORACLE = HERE.parents[1] / ".venv-oracle" / "bin" / "python"
NAMES = ["v2_lite", "v3", "kimi_k2"]
FP8 = "fp8"


def oracle(*arguments: object) -> None:
    command = [str(ORACLE), str(HERE / "directories.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def convert(*arguments: object) -> None:
    assert convert_weights.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def stations(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per model HUB/NAME, its import MID/NAME, and OUT/NAME exported from it, in float32.

    The FP8 checkpoint is NumPy's; HUB/fp8 is its float32 twin, made by the exact dequantizer,
    because transformers' own is wrong for dimensions that 128 does not divide.
    """
    if golden_dir == golden.COMMITTED:
        pytest.skip("needs transformers: make parity")
    folder = tmp_path_factory.mktemp("stations")
    oracle("write", folder / "HUB", *(f"{name}={golden.read(name).seed}" for name in NAMES))
    raw = published.fp8(published.bf16())
    config = published.CONFIG | {"quantization_config": published.FP8}
    published.write(folder / "FP8", raw, config)
    twin = {
        name: exact.dequantized(tensor, raw[name + "_scale_inv"], exact.F32).astype(np.float32)
        if name + "_scale_inv" in raw
        else tensor.astype(np.float32)
        for name, tensor in raw.items()
        if not name.endswith("_scale_inv")
    }
    published.write(folder / "HUB" / FP8, twin, published.CONFIG | {"torch_dtype": "float32"})
    for name in NAMES:
        convert("import", folder / "HUB" / name, folder / "MID" / name)
        convert("export", folder / "MID" / name, folder / "OUT" / name, "--shard-size", "40kB")
    convert("import", folder / "FP8", folder / "MID" / FP8)
    convert("export", folder / "MID" / FP8, folder / "OUT" / FP8, "--dtype", "fp32")
    return folder


def tokens_of(name: str) -> np.ndarray:
    if name == FP8:
        return np.random.default_rng(2).integers(0, cases.CASES["v3"]["vocab_size"], (2, 12))
    return golden.read(name).tokens_BT


@pytest.fixture(scope="module")
def theirs(stations: Path) -> Mapping[str, np.ndarray]:
    """transformers' logits of each directory of HUB and OUT."""
    directories = {
        str(stations / station / name): name for station in ("HUB", "OUT") for name in (*NAMES, FP8)
    }
    np.savez(stations / "tokens.npz", **{d: tokens_of(name) for d, name in directories.items()})
    oracle("logits", stations / "tokens.npz", stations / "logits.npz", *directories)
    with np.load(stations / "logits.npz") as found:
        return dict(found)


@pytest.mark.parametrize("name", [*NAMES, FP8])
def test_an_import_computes_what_transformers_computes(stations: Path, theirs: Mapping, name: str):
    model = from_pretrained(stations / "MID" / name, dtype=np.float32)
    ours, _ = logits_and_losses(model, one_document_rows(tokens_of(name).astype(np.int32)))
    assert len(ours) == 1 + cases.CASES.get(name, published.CONFIG).get(
        "num_nextn_predict_layers", 0
    )
    for depth, logits in enumerate(ours):
        expected = theirs[f"{stations / 'HUB' / name}:{depth}"]
        assert rel_err(logits, expected) < TOLERANCE["f32"], depth


@pytest.mark.parametrize("name", [*NAMES, FP8])
def test_transformers_reads_an_export_as_it_read_the_source(
    stations: Path, theirs: Mapping, name: str
):
    found = {key: logits for key, logits in theirs.items() if f"/OUT/{name}:" in key}
    assert found
    for key, logits in found.items():
        np.testing.assert_array_equal(logits, theirs[key.replace("/OUT/", "/HUB/")], key)


@pytest.mark.parametrize("name", NAMES)
def test_an_export_holds_the_bytes_that_transformers_wrote(stations: Path, name: str):
    published.same(published.read(stations / "OUT" / name), published.read(stations / "HUB" / name))


def test_fp8_comes_back_as_it_was(stations: Path, tmp_path: Path):
    convert("export", stations / "MID" / FP8, tmp_path / "OUT")
    published.same(published.read(tmp_path / "OUT"), published.read(stations / "FP8"))
    values = published.read(tmp_path / "OUT")["model.layers.4.mlp.experts.0.up_proj.weight"]
    assert values.dtype == ml_dtypes.float8_e4m3fn
