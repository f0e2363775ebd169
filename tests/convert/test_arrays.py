"""Converted checkpoints on disk: zarr as other software reads it, and chunks cut at any size."""

import gzip
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

import golden
import weights
from dsjax import from_pretrained, hf, sharding
from dsjax.convert import arrays
from dsjax.convert.importing import import_checkpoint
from dsjax.convert.opened import open_checkpoint
from dsjax.hf import names
from dsjax.hf.safetensors_file import DTYPES
from dsjax.hf.tensors import whole
from tests.convert import published

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"


class Described:
    """A tensor of which only type and shape are known."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        raise AssertionError("read")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "v3"
    import_checkpoint(golden_dir / "v3", directory)
    return directory


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_orbax_restores_what_the_table_says(converted: Path, golden_dir: Path, axes: dict):
    """Orbax and tensorstore know nothing of this code: neither of names nor of transposes."""
    mesh = sharding.make_mesh(**axes, devices=None if axes else jax.devices()[:1])
    expected = dict(names.variables(from_pretrained(golden_dir / "v3", mesh=mesh)))
    wanted = {
        path: jax.ShapeDtypeStruct(
            variable.shape, jnp.float32, sharding=variable.get_value().sharding
        )
        for path, variable in expected.items()
    }
    found = ocp.StandardCheckpointer().restore(converted / "model", wanted)
    for path, array in found.items():
        assert array.sharding == wanted[path].sharding
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path].get_value()))


def test_a_mesh_of_eight_reads_the_same_weights(converted: Path, golden_dir: Path):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    ours = dict(names.variables(from_pretrained(converted, mesh=mesh)))
    for path, variable in names.variables(from_pretrained(golden_dir / "v3")):
        np.testing.assert_array_equal(
            np.asarray(ours[path].get_value()), np.asarray(variable.get_value()), path
        )


@pytest.mark.parametrize("most", [200, 700, 3000])
def test_tensors_cut_into_chunks_are_whole_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden_dir: Path, most: int
):
    """At 200 bytes even the smallest rows are a chunk each; 700 leaves last chunks half empty."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", most)
    import_checkpoint(golden_dir / "v3", tmp_path / "v3")
    tensors, expected = open_checkpoint(tmp_path / "v3").tensors, published.read(golden_dir / "v3")
    several = 0
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(whole(tensor), expected[name])
        start, stop = tensor.shape[0] // 3, tensor.shape[0] - 1
        rest = (slice(1, 5),) * (len(tensor.shape) - 1)
        index = (slice(start, stop), *rest)
        np.testing.assert_array_equal(tensor[index], expected[name][index])
    for path, variable in names.variables(from_pretrained(golden_dir / "v3")):
        store = tensorstore.open(
            {"driver": "zarr3", "kvstore": f"file://{tmp_path}/v3/model/{path}/"}, open=True
        ).result()
        several += math.prod(store.chunk_layout.read_chunk.shape) * 4 <= most < store.size * 4
        np.testing.assert_array_equal(store.read().result(), np.asarray(variable.get_value()))
    assert several > 5


def test_parts_of_one_weight_have_one_type():
    known = golden.read("v3")
    drawn = weights.draw_all(known.seed, known.config)
    name = "model.layers.3.mlp.experts.7.up_proj.weight"
    drawn[name] = drawn[name].astype(np.float16)
    with pytest.raises(ValueError, match=f"{name} is float16 .* float64; give one type"):
        arrays.array_dtypes(hf.model_config(known.config), drawn)


@pytest.mark.parametrize("name", ["deepseek_r1", "kimi_k2"])
def test_every_published_tensor_has_a_place_of_its_own(name: str):
    """The real checkpoints: type, shape and bytes of each tensor, and no file twice."""
    path = CHECKPOINTS / f"{name}.tensors.json.gz"
    if not path.exists():
        pytest.skip(f"the published {path.name} is not beside this project")
    model = hf.model_config(json.loads((CHECKPOINTS / f"{name}.config.json").read_text()))
    with gzip.open(path) as file:
        tensors = {
            name: Described(tuple(found["shape"]), DTYPES[found["dtype"]])
            for name, found in json.load(file).items()
            if not names.IGNORED.fullmatch(name)
        }
    layout = arrays.layout(model, arrays.array_dtypes(model, tensors))
    assert layout.slots.keys() == tensors.keys() - names.copies(model).keys()
    assert max(array.chunk_bytes for array in layout.arrays.values()) <= arrays.CHUNK_BYTES
    for tensor, slot in layout.slots.items():
        assert (slot.shape, slot.array.dtype) == (tensors[tensor].shape, tensors[tensor].dtype)
    assert len({(slot.array.name, slot.place) for slot in layout.slots.values()}) == len(
        layout.slots
    )
    for slot in list(layout.slots.values())[::101]:
        chunks = list(slot.chunks())
        assert [c.start for c in chunks] == [0, *(c.end for c in chunks[:-1])]
        assert chunks[-1].end == slot.shape[0]
        assert len({chunk.file for chunk in chunks}) == len(chunks)
    # Five blocks of rows for 576, the published shape of kv_a_proj's scales.
    scales = layout.slots["model.layers.9.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    assert scales.shape == (5, 56)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: (d / "dsjax.json").unlink(), "unfinished import"),
        (lambda d: (d / "model/embed/c/0/0").unlink(), "model/embed/c/0/0 has None bytes"),
        (lambda d: (d / "model/embed/c/0/0").write_bytes(b"1"), "embed/c/0/0 has 1 bytes, expect"),
        (lambda d: (d / "model/embed/zarr.json").unlink(), "embed/zarr.json is damaged or missing"),
        (
            lambda d: (d / "model/embed/zarr.json").write_text("{}"),
            "zarr.json is not as dsjax.json",
        ),
        (lambda d: (d / "dsjax.json").write_text("[]"), "dsjax.json holds a list"),
        (lambda d: (d / "dsjax.json").write_text('{"version": 9}'), "has version 9, expected 1"),
    ],
)
def test_a_damaged_conversion_is_refused(tmp_path: Path, golden_dir: Path, damage, told: str):
    import_checkpoint(golden_dir / "v2_lite", tmp_path / "DST")
    damage(tmp_path / "DST")
    with pytest.raises(ValueError, match=told):
        from_pretrained(tmp_path / "DST")
