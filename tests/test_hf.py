"""Hugging Face directories in: files, names, layouts, and what of these is refused."""

import gzip
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import exact
import golden
import weights
from dsjax import from_pretrained, hf, sharding
from dsjax.hf import names
from dsjax.model import Transformer, abstract
from dsjax.params import FullPrecision, RouterBias, count
from tests.convert import published as published_checkpoint
from tests.drawn import FAST_COMPILE
from tests.tolerance import TOLERANCE, rel_err

CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"
SAVED = ["v2_lite", "v3"]


@pytest.fixture
def saved(golden_dir: Path, tmp_path: Path):
    """Copies a stored directory (single file: v2_lite, shards: v3) to where it may be damaged."""
    return lambda name: Path(shutil.copytree(golden_dir / name, tmp_path / name))


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def arrays(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(v.get_value()) for path, v in names.variables(model)}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_directory_computes_what_transformers_computed(name: str, golden_dir: Path):
    known = golden.read(name)
    model = from_pretrained(golden_dir / name)
    run = jax.jit(Transformer.__call__, compiler_options=FAST_COMPILE)
    assert rel_err(run(model, jnp.asarray(known.tokens_BT)), known.logits_BTV) < TOLERANCE["f32"]


@pytest.mark.parametrize("name", SAVED)
def test_each_layout_is_the_one_written_out_here(name: str, golden_dir: Path):
    """The table's patterns once more by hand, with other means."""
    hub = {}
    for file in (golden_dir / name).glob("*.safetensors"):
        hub |= load_file(file)
    config = json.loads((golden_dir / name / "config.json").read_text())
    N, dense = config["num_attention_heads"], config["first_k_dense_replace"]
    model = from_pretrained(golden_dir / name)
    ours = arrays(model)
    last = config["num_hidden_layers"] - 1
    stack, attn = "layers.1.blocks.0.", f"model.layers.{last}.self_attn."
    W_o, W_kvb = hub[attn + "o_proj.weight"], hub[attn + "kv_b_proj.weight"]
    for n in range(N):
        width, rows = W_o.shape[1] // N, W_kvb.shape[0] // N
        found = ours[stack + "attention.o_proj"][last - dense, n]
        np.testing.assert_array_equal(found, W_o[:, n * width : (n + 1) * width].T)
        found = ours[stack + "attention.kv_b_proj"][last - dense, :, n]
        np.testing.assert_array_equal(found, W_kvb[n * rows : (n + 1) * rows].T)
    for expert in (0, 3):
        for pair, part in enumerate(("gate", "up")):
            W = hub[f"model.layers.{last}.mlp.experts.{expert}.{part}_proj.weight"]
            found = ours[stack + "ffn.experts.gate_up_proj"][last - dense, expert, :, pair]
            np.testing.assert_array_equal(found, W.T)
    np.testing.assert_array_equal(ours["lm_head"], hub["lm_head.weight"].T)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}])
def test_a_mesh_of_eight_holds_the_same_weights(axes: dict, golden_dir: Path):
    plain = arrays(from_pretrained(golden_dir / "v3"))
    mesh = sharding.make_mesh(**axes)
    model = from_pretrained(golden_dir / "v3", mesh=mesh)
    for path, variable in names.variables(model):
        array = variable.get_value()
        where = sharding.stored_spec(variable, mesh)
        assert array.sharding == jax.sharding.NamedSharding(mesh, where)
        np.testing.assert_array_equal(np.asarray(array), plain[path], path)


def test_a_device_reads_only_its_part():
    """Counted in elements; devices with the same part share one reading."""
    known, read = golden.read("v3"), []

    class Counting(np.ndarray):
        def __getitem__(self, index):
            part = np.asarray(super().__getitem__(index))
            read.append(part.size)
            return part

    drawn = weights.draw_all(known.seed, known.config)
    one = "model.layers.2.mlp.experts.5.up_proj.weight"
    drawn[one] = drawn[one].view(Counting)
    mesh = sharding.make_mesh(data=2, expert=2, fsdp=2)
    hf.load_weights(drawn, hf.model_config(known.config), dtype=jnp.float32, mesh=mesh)
    # Expert 5 lies on four devices: two halves of its input, each twice along `data`.
    assert read == [drawn[one].size // 2] * 2


def test_types(golden_dir: Path, saved):
    directory = saved("v2_lite")
    as_bf16 = {
        k: v.astype(jnp.bfloat16) for k, v in load_file(directory / "model.safetensors").items()
    }
    save_file(as_bf16, directory / "model.safetensors")
    of_disk = from_pretrained(directory)
    asked = from_pretrained(golden_dir / "v2_lite", dtype=jnp.bfloat16)
    for model in (of_disk, asked, from_pretrained(directory, dtype=jnp.float16)):
        wanted = jnp.float16 if model.embed.dtype == jnp.float16 else jnp.bfloat16
        for path, variable in names.variables(model):
            wide = isinstance(variable, FullPrecision | RouterBias)
            assert variable.get_value().dtype == (jnp.float32 if wide else wanted), path
    for path, values in arrays(of_disk).items():
        if "gate_proj" not in path:
            np.testing.assert_array_equal(values, arrays(asked)[path])
    with pytest.raises(ValueError, match="float64"):
        from_pretrained(directory, dtype=np.float64)
    with jax.enable_x64(True):
        wide = from_pretrained(directory, dtype=jnp.float64)
        assert {v.get_value().dtype for _, v in names.variables(wide)} == {np.dtype(np.float64)}


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_fp8_is_multiplied_by_its_scales(dtype: type | None, tmp_path: Path):
    """Against NumPy in float64, every product rounded once to the type asked for."""
    known = published_checkpoint.CONFIG
    fp8 = published_checkpoint.fp8(published_checkpoint.bf16())
    kind = exact.BF16 if dtype is None else exact.F32
    plain = {
        name: exact.dequantized(t, fp8[name + "_scale_inv"], kind)
        if name + "_scale_inv" in fp8
        else t
        for name, t in fp8.items()
        if not name.endswith("_scale_inv")
    }
    config = known | {"quantization_config": published_checkpoint.FP8}
    directory = published_checkpoint.write(tmp_path / "fp8", fp8, config)
    found = arrays(from_pretrained(directory, dtype=dtype))
    wanted = hf.load_weights(plain, hf.model_config(known), dtype=dtype or jnp.bfloat16)
    for path, values in arrays(wanted).items():
        assert found[path].dtype == values.dtype
        np.testing.assert_array_equal(found[path], values, path)


def test_transformers_5_writes_the_same_model(golden_dir: Path):
    for name in SAVED:
        written = json.loads((golden_dir / name / "config.json").read_text())
        assert hf.model_config(written) == hf.model_config(golden.read(name).config)


def damaged(directory: Path, kind: str) -> None:
    index, first = directory / "model.safetensors.index.json", directory / "model-mtp.safetensors"
    tensors = load_file(first)
    places = json.loads(index.read_text())["weight_map"]
    eh_proj = "model.layers.4.eh_proj.weight"
    match kind:
        case "no config":
            (directory / "config.json").unlink()
        case "broken config":
            (directory / "config.json").write_text("{")
        case "missing file":
            first.unlink()
        case "truncated":
            first.write_bytes(first.read_bytes()[:-4])
        case "outside":
            change(index, weight_map=places | {eh_proj: "../model-mtp.safetensors"})
        case "index disagrees":
            change(index, weight_map={k: v for k, v in places.items() if k != eh_proj})
        case "missing tensor":
            save_file({k: v for k, v in tensors.items() if k != eh_proj}, first)
            change(index, weight_map={k: v for k, v in places.items() if k != eh_proj})
        case "unexpected tensor":
            save_file(tensors | {"model.layers.4.extra.weight": np.zeros(2, np.float32)}, first)
            change(index, weight_map=places | {"model.layers.4.extra.weight": first.name})
        case "wrong shape":
            save_file(tensors | {eh_proj: tensors[eh_proj].T.copy()}, first)
        case "differing copy":
            save_file(tensors | {COPY: tensors[COPY] + 1}, first)
        case "fp8":
            save_file(tensors | {eh_proj: tensors[eh_proj].astype(jnp.float8_e4m3fn)}, first)
        case "pickle":
            index.unlink()
            (directory / "pytorch_model.bin").touch()


COPY = "model.layers.4.embed_tokens.weight"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no config", "config.json does not exist"),
        ("broken config", "config.json is not readable JSON"),
        ("missing file", "model-mtp.safetensors does not exist"),
        ("truncated", "model-mtp.safetensors is damaged"),
        ("outside", "lies outside"),
        ("index disagrees", "disagree on 1 tensors: model.layers.4.eh_proj.weight"),
        ("missing tensor", "lacks 1 tensors .*: model.layers.4.eh_proj.weight"),
        ("unexpected tensor", "no place for: model.layers.4.extra.weight"),
        ("wrong shape", r"eh_proj.weight in .* is \(32, 16\), not \(16, 32\)"),
        ("differing copy", f"{COPY} differs from model.embed_tokens.weight"),
        ("fp8", "FP8 tensors have no scales: model.layers.4.eh_proj.weight_scale_inv"),
        ("pickle", "pytorch_model.bin are not read"),
    ],
)
def test_a_damaged_directory_is_refused_by_name(kind: str, told: str, saved):
    directory = saved("v3")
    damaged(directory, kind)
    with pytest.raises(ValueError, match=told):
        from_pretrained(directory)


def test_no_directory_is_refused():
    with pytest.raises(ValueError, match="'deepseek-ai/DeepSeek-V3' is no directory"):
        from_pretrained("deepseek-ai/DeepSeek-V3")


def test_without_its_mtp_layer_a_checkpoint_is_loaded_with_a_warning():
    known = golden.read("v3")
    main = {
        name: tensor
        for name, tensor in weights.draw_all(known.seed, known.config).items()
        if not name.startswith("model.layers.4.")
    }
    spec = hf.model_config(known.config)
    with pytest.warns(UserWarning, match="announces 1 MTP layers but the checkpoint holds none"):
        model = hf.load_weights(main, spec, dtype=jnp.float32)
    assert model.config.mtp == () and len(model.mtp) == 0


def test_kimi_s_stored_frequencies_are_ignored():
    known = golden.read("kimi_k2")
    tensors = weights.draw_all(known.seed, known.config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4)
    hf.load_weights(tensors, hf.model_config(known.config), dtype=jnp.float32)


def published(name: str) -> dict:
    path = CHECKPOINTS / f"{name}.config.json"
    if not path.exists():
        pytest.skip(f"the published {path.name} is not beside this project")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["deepseek_v4_flash", "deepseek_v4_pro"])
def test_v4_is_refused_by_its_first_unknown_field(name: str):
    with pytest.raises(ValueError, match="expert_dtype is 'fp4'; this field is unknown"):
        hf.model_config(published(name))


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("deepseek_r1", 671_026_419_200 + 13_463_426_304 - 2 * 926_679_040),
        pytest.param("kimi_k2", None, marks=pytest.mark.thorough),
    ],
)
def test_every_published_tensor_has_its_place(name: str, total: int | None):
    """Names and shapes of the real checkpoints against the table: nothing left on either side."""
    spec = hf.model_config(published(name))
    with gzip.open(CHECKPOINTS / f"{name}.tensors.json.gz") as file:
        tensors = {
            name: tuple(tensor["shape"])
            for name, tensor in json.load(file).items()
            if not name.endswith("weight_scale_inv") and not names.IGNORED.fullmatch(name)
        }
    module = abstract(spec)
    sources = names.sources(module, spec)
    taken = {}
    for path, variable in names.variables(module):
        for hub in sources[path].names.flat:
            assert hub not in taken
            taken[hub] = sources[path].hub_shape(variable.shape)
    copies = {copy: taken[original] for copy, original in names.copies(spec).items()}
    assert taken | copies == tensors
    size = count(module)
    assert size == sum(int(np.prod(shape)) for shape in taken.values())
    if total is not None:
        assert size == total
