"""Cached decoding against the plain forward pass, sampling against hand-made distributions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert_weights
import golden
import weights
from dsjax import from_pretrained, hf, sharding
from dsjax.cli import main
from dsjax.generate import decode, generate, prefill, sample
from dsjax.model import Transformer, abstract
from dsjax.nn import masks
from dsjax.nn.block_fp8 import BlockFp8
from dsjax.nn.mla import MlaAttention
from dsjax.nn.precision import products
from tests.drawn import FAST_COMPILE
from tests.drawn import model as drawn_model
from tests.tolerance import TOLERANCE, rel_err

ROOT = Path(__file__).parents[1]
FAMILY = ["v2_lite", "v3", "kimi_k2"]

forward = jax.jit(Transformer.__call__, compiler_options=FAST_COMPILE)


def tiny(name: str, dtype: jnp.dtype = jnp.float32) -> Transformer:
    """The model of a golden, without its MTP layers."""
    known = golden.read(name)
    config = known.config | {"num_nextn_predict_layers": 0}
    return hf.load_weights(
        weights.draw_all(known.seed, config), hf.model_config(config), dtype=dtype
    )


def int32(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("v3", "f64"),
        pytest.param("v2_lite", "f32", marks=pytest.mark.thorough),
        pytest.param("v3", "f32", marks=pytest.mark.thorough),
        pytest.param("v2_lite", "f64", marks=pytest.mark.thorough),
        pytest.param("kimi_k2", "f64", marks=pytest.mark.thorough),
        pytest.param("kimi_k2", "f32", marks=pytest.mark.thorough),
    ],
)
def test_prefill_and_decode_are_the_forward_pass(name: str, precision: str):
    """Two prompts of different lengths at once, padded with tokens that must not matter."""
    with jax.enable_x64(precision == "f64"):
        model = tiny(name, jnp.float64 if precision == "f64" else jnp.float32)
        tokens_BT = jnp.asarray(golden.read(name).tokens_BT)
        length = tokens_BT.shape[1]
        expected = np.asarray(forward(model, tokens_BT))
        first = np.array([3, 7])
        padded = jnp.where(jnp.arange(8)[None] < first[:, None], tokens_BT[:, :8], 5)
        logits, cache = prefill(model, padded, int32(*first), model.init_caches(2, 16))
        for step in range(length - max(first) + 1):
            at = first + step
            wanted = expected[[0, 1], at - 1]
            assert rel_err(logits, wanted) < TOLERANCE[precision], f"after {at} tokens"
            if max(at) < length:
                token = jnp.asarray(np.asarray(tokens_BT)[[0, 1], at])
                logits, cache = decode(model, token, int32(*at), cache)


@pytest.mark.parametrize("name", FAMILY)
def test_absorbed_is_expanded(name: str, seed: int):
    model = tiny(name)
    spec = model.config.blocks[0].attention
    attention: MlaAttention = jax.tree.map(lambda x: x[0], model.layers[0].blocks[0].attention)
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    inputs = (
        draw(2, 3, spec.num_heads, spec.qk_nope_head_dim),
        draw(2, 3, spec.num_heads, spec.qk_rope_head_dim),
        draw(2, 9, spec.kv_lora_rank),
        draw(2, 9, spec.qk_rope_head_dim),
    )
    visible = masks.over_cache(masks.Places(jnp.array([[4, 5, 6], [0, 1, 2]], jnp.int32)), 9)
    expanded = attention.expanded(*inputs, visible)
    assert rel_err(attention.absorbed(*inputs, visible), expanded) < TOLERANCE["f32"]


@pytest.mark.parametrize("name", FAMILY)
def test_the_cache_is_c_plus_r_numbers_per_token_and_layer(name: str):
    model = tiny(name)
    spec = model.config.blocks[0].attention
    _, cache = prefill(model, jnp.ones((2, 8), jnp.int32), int32(8, 8), model.init_caches(2, 32))
    size = sum(x.size for x in jax.tree.leaves(cache))
    per_token = spec.kv_lora_rank + spec.qk_rope_head_dim
    assert size == model.config.num_layers * 2 * 32 * per_token


def test_decoding_writes_into_the_cache_and_copies_none():
    model = abstract(drawn_model(repeat=8, mtp=0))
    cache = jax.eval_shape(lambda model: model.init_caches(2, 4096), model)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    each = jax.ShapeDtypeStruct((2,), jnp.int32)
    memory = decode.lower(model, each, each, cache).compile(FAST_COMPILE).memory_analysis()
    assert memory.alias_size_in_bytes == size, "the new one lies where the old one did"
    assert memory.temp_size_in_bytes < size / 2, "a layer's slots are read, at most, at a time"


def test_greedy_is_the_argmax_of_the_forward_pass():
    model = tiny("v3")
    prompt = [3, 1, 4]
    found = list(generate(model, prompt, max_new_tokens=6, temperature=0.0))
    # Fed its own words, the plain forward pass would have said the same.
    logits = forward(model, jnp.asarray([prompt + found], jnp.int32))[0]
    assert found == list(np.asarray(logits.argmax(-1))[len(prompt) - 1 : -1])
    ended = generate(model, prompt, max_new_tokens=6, temperature=0.0, eos_ids={found[3]})
    assert list(ended) == found[: found.index(found[3])]


def test_the_seed_decides():
    model = tiny("v3")

    def text(seed: int) -> list[int]:
        return list(generate(model, [3, 1], max_new_tokens=8, temperature=1.5, seed=seed))

    assert text(1) == text(1) != text(2)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2}]
)
def test_a_mesh_says_the_same(axes: dict, golden_dir: Path):
    plain = list(generate(from_pretrained(golden_dir / "v3"), [3, 1, 4], max_new_tokens=4))
    mesh = sharding.make_mesh(**axes)
    with jax.set_mesh(mesh):
        model = from_pretrained(golden_dir / "v3", mesh=mesh)
        for places in (sharding.shardings, sharding.serving_shardings):
            model = jax.device_put(model, places(model, mesh))
            assert plain == list(generate(model, [3, 1, 4], max_new_tokens=4))


def drawn(probabilities: list[float], *, temperature: float = 1.0, top_p: float = 1.0, **more):
    """How often each token comes in 4000 draws from the given distribution."""
    logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)), (4000, len(probabilities)))
    more = {"num_tokens": len(probabilities)} | more
    tokens = sample(logits, jax.random.key(0), temperature=temperature, top_p=top_p, **more)
    return np.bincount(np.asarray(tokens), minlength=len(probabilities)) / 4000


# 4000 draws: the standard error of a share is at most 0.008; four of them.
CLOSE = 0.032


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, [0.2, 0.5, 0.05, 0.25]),
        (0.8, [0.2 / 0.95, 0.5 / 0.95, 0.0, 0.25 / 0.95]),
        (0.7, [0.0, 2 / 3, 0.0, 1 / 3]),
        (0.5, [0.0, 1.0, 0.0, 0.0]),
        (0.01, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, expected: list[float]):
    found = drawn([0.2, 0.5, 0.05, 0.25], top_p=top_p - 1e-4 if top_p < 1.0 else top_p)
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert (found[np.array(expected) == 0.0] == 0.0).all()


def test_temperature_sharpens_before_top_p_cuts():
    p = np.array([0.2, 0.5, 0.05, 0.25])
    np.testing.assert_allclose(drawn(list(p), temperature=0.5), p**2 / (p**2).sum(), atol=CLOSE)
    np.testing.assert_allclose(drawn(list(p), temperature=0.0), [0, 1, 0, 0])
    # Squared and normalised, 0.5 becomes 0.72: alone enough for 0.7, as it is not at temperature 1.
    np.testing.assert_allclose(drawn(list(p), temperature=0.5, top_p=0.7), [0, 1, 0, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_of_the_vocabulary_is_never_drawn(temperature: float):
    found = drawn([0.1, 0.2, 0.7], temperature=temperature, num_tokens=2)
    assert found[2] == 0.0
    np.testing.assert_allclose(found[:2], [0, 1] if not temperature else [1 / 3, 2 / 3], atol=CLOSE)


@pytest.mark.parametrize(
    ("prompt", "settings", "told"),
    [
        ([], {}, "prompt is empty"),
        ([40], {}, "rows 0 to 39"),
        ([-1], {}, "from -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"max_new_tokens": 64}, "at most 64 positions"),
        ([1], {"temperature": -0.1}, "temperature=-0.1"),
        ([1], {"temperature": np.nan}, "temperature=nan"),
        ([1], {"seed": 2**32}, "seed=4294967296 must lie between 0 and"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"num_tokens": 41}, "num_tokens=41"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt: list, settings: dict, told: str):
    with pytest.raises(ValueError, match=told):
        generate(tiny("v2_lite"), prompt, **({"max_new_tokens": 4} | settings))


def tokenizer_of(num_tokens: int) -> str:
    """A tokenizer.json whose token i is the character i + 48."""
    import tokenizers

    vocabulary = {chr(48 + i): i for i in range(num_tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made.to_str()


@pytest.fixture
def hub_directory(golden_dir: Path, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(golden_dir / "v2_lite", tmp_path / "v2_lite"))
    (directory / "tokenizer.json").write_text(tokenizer_of(38))
    return directory


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dsjax", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_the_command_continues_a_text(hub_directory: Path):
    done = command(
        *("generate", hub_directory, "--prompt", "2:8"),
        *("--max-new-tokens", 5, "--temperature", 0),
    )
    assert done.returncode == 0, done.stderr
    (hub_directory / "generation_config.json").unlink()
    model = from_pretrained(hub_directory)
    ids = list(generate(model, [2, 10, 8], max_new_tokens=5, temperature=0.0, num_tokens=38))
    ids = ids[: ids.index(1)] if 1 in ids else ids
    assert done.stdout == "2:8" + "".join(chr(48 + i) for i in ids) + "\n"


@pytest.mark.thorough
def test_the_command_computes_in_fp8_with_the_weights_of_the_checkpoint(hub_directory, capsys):
    path = hub_directory.with_name("fp8")
    assert convert_weights.main(["cast", str(hub_directory), str(path), "--dtype", "fp8"]) == 0
    model = from_pretrained(path, dtype=jnp.bfloat16, keep_fp8=True)
    with products(BlockFp8()):
        ids = list(generate(model, [2, 10, 8], max_new_tokens=5, temperature=0.0, num_tokens=38))
    capsys.readouterr()
    sizes = ["--max-new-tokens", "5", "--temperature", "0", "--precision", "fp8"]
    assert main(["generate", str(path), "--prompt", "2:8", *sizes]) == 0
    ids = ids[: ids.index(1)] if 1 in ids else ids
    assert capsys.readouterr().out == "2:8" + "".join(chr(48 + i) for i in ids) + "\n"


@pytest.mark.parametrize("kind", ["no directory", "no tokenizer", "refused config"])
def test_the_command_tells_in_one_line_what_is_wrong(kind: str, hub_directory: Path, capsys):
    path = hub_directory
    if kind == "no directory":
        path = hub_directory / "elsewhere"
    if kind == "no tokenizer":
        (hub_directory / "tokenizer.json").unlink()
    if kind == "refused config":
        file = hub_directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    assert main(["generate", str(path), "--prompt", "2:8"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("dsjax: ") and told.err.count("\n") == 1
    assert {"refused config": "hidden_act"}.get(kind, str(path)) in told.err
