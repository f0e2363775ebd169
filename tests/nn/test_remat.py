"""Every remat policy computes the same gradients and keeps what its name says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import Block, Dense, LayerGroup
from dsjax.nn.remat import REMAT
from dsjax.params import RouterBias
from dsjax.train_step import forward
from tests import drawn
from tests.tolerance import TOLERANCE, rel_err

SEED = 3
SPARSE = drawn.model(mtp=0, q_lora_rank=6)
DENSE = Block(attention=SPARSE.blocks[0].attention, ffn=Dense(intermediate_size=16))
MODEL = dataclasses.replace(SPARSE, layers=(LayerGroup(repeat=2, pattern=(DENSE,)),))
# Numbers per token that attention's latents have in MODEL: of queries, of keys and values.
QUERY, KEY_VALUE = 6, 8 + 4


def loss_of(remat: str):
    run = drawn.run(MODEL, remat=remat)
    graph, params, biases = nnx.split(drawn.state(run, SEED).model, nnx.Param, RouterBias)
    batch = jax.tree.map(lambda x: x[0], drawn.batch(1))

    def loss(params):
        model = nnx.merge(graph, params, biases)
        return forward(model, batch, [jnp.float32(1.0)], remat=remat)[0]

    return loss, params


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    loss, params = loss_of("none")
    return drawn.leaves(jax.jit(jax.grad(loss))(params))


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(name, marks=() if name == "full" else pytest.mark.thorough)
        for name in sorted(set(REMAT) - {"none"})
    ],
)
def test_gradients_are_those_without_recomputing(remat, plain):
    loss, params = loss_of(remat)
    found = drawn.leaves(jax.jit(jax.grad(loss))(params))
    for path, value in plain.items():
        assert rel_err(found[path], value) < TOLERANCE["f32"], path


def kept(remat: str) -> list[tuple[int, ...]]:
    """Shapes of what the scan over the two layers leaves for backward, stacked by layer."""
    loss, params = loss_of(remat)
    jaxpr = jax.make_jaxpr(lambda params: jax.vjp(loss, params)[1])(params)
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 2]
    return [v.aval.shape for v in scans[0].outvars if v.aval.shape[:3] == (2, 8, 16)]


def test_what_each_policy_keeps_of_a_layer():
    layer_input = (2, 8, 16, MODEL.hidden_size)
    assert kept("full") == [layer_input]
    latents = {(2, 8, 16, QUERY), (2, 8, 16, KEY_VALUE)}
    assert set(kept("save_latents")) == {layer_input} | latents
    assert len(kept("save_latents")) == 3
    assert len(kept("none")) > 10


def test_offload_sends_the_inputs_of_layers_to_the_host():
    loss, params = loss_of("offload")
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "pinned_host" in text or "<host>" in text
