"""What the benchmarks of FP8 say of memory and of losses, counted another way."""

import math

import jax
import pytest
from flax import nnx

from benchmarks import fp8_memory, fp8_training
from dsjax.model import Block
from dsjax.run_file import load


@pytest.mark.parametrize(
    "name, bytes_each", [pytest.param("bf16", 2, marks=pytest.mark.thorough), ("fp8", 1)]
)
def test_weights_are_told_from_activations(name, bytes_each):
    model = load("configs/tiny_fp8.py").model
    spec = model.layers[-1].pattern[-1]
    block = jax.eval_shape(lambda: Block(spec, model, rngs=nnx.Rngs(0)))
    of_weights = bytes_each * sum(leaf.size for leaf in jax.tree.leaves(block))
    _, weights = fp8_memory.kept_bytes(spec, model, 1024, name)
    # The router and norms are in FP32, scales are few.
    assert of_weights < weights < 1.2 * of_weights


def test_a_last_window_of_fewer_steps_is_a_mean_too():
    found = fp8_training.windows([2.0] * fp8_training.WINDOW + [4.0, 6.0])
    assert math.isclose(found[0], 2.0) and math.isclose(found[1], 5.0) and len(found) == 2
