"""FP8 checkpoints that stay FP8 in memory: the same bytes, and the same model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import from_pretrained, sharding
from dsjax.block_scaled import BlockScaled
from dsjax.convert.opened import open_checkpoint
from dsjax.generate import generate
from dsjax.hf import names
from dsjax.hf.tensors import whole as read
from dsjax.model import Transformer
from dsjax.nn.block_fp8 import BlockFp8
from dsjax.nn.precision import Exact, products
from dsjax.params import count
from tests.convert import published
from tests.drawn import FAST_COMPILE
from tests.tolerance import TOLERANCE, rel_err

TOKENS = np.random.default_rng(0).integers(0, 30, (4, 8), np.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    config = published.FEW_EXPERTS | {"quantization_config": published.FP8}
    tensors = published.fp8(published.bf16(config))
    return published.write(tmp_path_factory.mktemp("fp8") / "checkpoint", tensors, config)


@pytest.fixture(scope="module")
def kept(directory) -> Transformer:
    return from_pretrained(directory, dtype=jnp.float32, keep_fp8=True)


@pytest.fixture(scope="module")
def wide(directory) -> Transformer:
    return from_pretrained(directory, dtype=jnp.float32)


def logits(model: Transformer, by=None) -> np.ndarray:
    def run(model, tokens):
        with products(by or Exact()):
            return model(tokens)

    compiled = jax.jit(run, compiler_options=FAST_COMPILE)
    return np.asarray(compiled(model, jnp.asarray(TOKENS)))


def stored(model: Transformer) -> dict[str, BlockScaled]:
    values = ((path, variable.get_value()) for path, variable in names.variables(model))
    return {path: value for path, value in values if isinstance(value, BlockScaled)}


def test_the_bytes_are_those_on_disk(directory, kept):
    tensors = open_checkpoint(directory).tensors
    sources, used = names.sources(kept, kept.config), set()
    for path, weight in stored(kept).items():
        tensor_of = sources[path].names
        for place in np.ndindex(tensor_of.shape):
            name = tensor_of[place]
            values, scales = read(tensors[name]), read(tensors[name + "_scale_inv"])
            assert weight.values.dtype == values.dtype
            np.testing.assert_array_equal(weight.values[place], values)
            np.testing.assert_array_equal(weight.scales[place], scales)
            used.add(name)
    assert used == {name for name, t in tensors.items() if t.dtype == jnp.float8_e4m3fn}
    assert used


def test_multiplied_out_they_are_the_weights(kept, wide):
    plain, weights = dict(names.variables(wide)), stored(kept)
    # All at once: one by one, every shape would be compiled for itself.
    multiply = jax.jit(
        lambda weights: {path: weight.whole(jnp.float32) for path, weight in weights.items()},
        compiler_options=FAST_COMPILE,
    )
    for path, found in multiply(weights).items():
        expected = plain[path].get_value()
        np.testing.assert_array_equal(found, expected)
        assert weights[path].shape == expected.shape


def test_logits_are_those_of_the_weights_multiplied_out(kept, wide):
    assert rel_err(logits(kept), logits(wide)) < TOLERANCE["f32"]


@pytest.mark.thorough
def test_logits_in_fp8_are_those_of_weights_quantized_again(kept, wide):
    """Whatever was quantized finds its codes again: the largest of a block is 448 scales."""
    found = logits(kept, BlockFp8())
    assert rel_err(found, logits(wide, BlockFp8())) < TOLERANCE["f32"]
    assert rel_err(found, logits(kept)) > 1e-3, "activations were not quantized"


@pytest.mark.thorough
def test_a_text_is_the_same(kept, wide):
    def text(model):
        return list(generate(model, [3, 1, 4], max_new_tokens=6, temperature=0.0))

    assert text(kept) == text(wide)


def test_a_number_takes_a_byte(kept, wide):
    def size(model):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(model))

    numbers = sum(weight.values.size for weight in stored(kept).values())
    scales = sum(4 * weight.scales.size for weight in stored(kept).values())
    assert size(kept) == size(wide) - 3 * numbers + scales
    assert count(kept) == count(wide)


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("axes", "by"),
    [
        pytest.param({"fsdp": 2, "expert": 2}, Exact(), marks=pytest.mark.thorough),
        pytest.param({"expert": 2, "tensor": 2}, Exact(), marks=pytest.mark.thorough),
        pytest.param({"fsdp": 2, "expert": 2}, BlockFp8(), marks=pytest.mark.thorough),
        pytest.param({"expert": 2, "tensor": 2}, BlockFp8(), marks=pytest.mark.thorough),
    ],
)
def test_a_mesh_says_the_same(directory, kept, axes, by):
    mesh = sharding.make_mesh(devices=jax.devices()[:4], **axes)
    cut = from_pretrained(directory, dtype=jnp.float32, mesh=mesh, keep_fp8=True)
    experts = stored(cut)["layers.1.blocks.0.ffn.experts.down_proj"]
    parts = mesh.shape["expert"] * mesh.shape["tensor"]
    assert experts.values.addressable_shards[0].data.shape[1] == 4 // parts
    with jax.set_mesh(mesh):
        found = logits(cut, by)
    expected = logits(kept, by)
    apart = [
        rel_err(*pair)
        for row in zip(found, expected, strict=True)
        for pair in zip(*row, strict=True)
    ]
    if by == Exact():
        assert max(apart) < TOLERANCE["f32"]
    else:
        # Sums in another order differ in the last bit, and that may change the code of a number.
        assert np.median(apart) < TOLERANCE["f32"]
        assert max(apart) < 2.0**-4


def test_what_is_not_fp8_cannot_be_kept_so(tmp_path):
    config = published.FEW_EXPERTS
    path = published.write(tmp_path / "plain", published.bf16(config), config)
    with pytest.raises(ValueError, match=r"has no FP8 weights to keep.*cast SRC DST --dtype fp8"):
        from_pretrained(path, keep_fp8=True)


def test_a_slice_of_it_is_refused(kept):
    weight = next(iter(stored(kept).values()))
    assert weight[...] is weight
    with pytest.raises(TypeError, match="no slice"):
        weight[..., :3]
