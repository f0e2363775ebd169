"""One device and eight virtual ones compute the same: loss, gradients, and the next state."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import losses, sharding
from dsjax.config import Model, SoftmaxRouter
from dsjax.model import abstract
from dsjax.run import LearningRate, MeshShape, Optim, Run
from dsjax.train_step import make_train_step, state_shardings
from tests import drawn
from tests.tolerance import TOLERANCE, rel_err

SEED = 5
MESHES = {
    "data 2, fsdp 2, expert 2": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp 8": {"fsdp": 8},
    "expert 8": {"expert": 8},
    "data 2, context 2, fsdp 2": {"data": 2, "context": 2, "fsdp": 2},
}

pytestmark = pytest.mark.usefixtures("uncached")


def v3_run(model: Model) -> Run:
    # Adam with an eps that large makes the first update the gradient itself, up to a factor; and
    # with that rate an error in it would show in the weights.
    rate = LearningRate(peak=1.0, warmup_steps=0)
    return drawn.run(
        model,
        optim=Optim(learning_rate=rate, eps=1.0, beta2=0.0, clip_norm=1e9),
    )


def stepped(run: Run, mesh: jax.sharding.Mesh | None):
    """Values after one step on packed rows: (state, metrics)."""
    state, batch, used = drawn.state(run, SEED), drawn.batch(1, micros=2), jnp.int32(2)
    step = make_train_step(run)
    if mesh is None:
        compiled = step.lower(state, batch, used).compile(drawn.FAST_COMPILE)
        return drawn.leaves(compiled(state, batch, used))
    with jax.set_mesh(mesh):
        state = jax.device_put(state, state_shardings(run, mesh))
        rows = jax.NamedSharding(mesh, sharding.spec(None, "batch", "length"))
        batch = jax.device_put(batch, jax.tree.map(lambda _: rows, batch))
        used = jax.device_put(used, jax.NamedSharding(mesh, jax.P()))
        compiled = step.lower(state, batch, used).compile(drawn.FAST_COMPILE)
        new = compiled(state, batch, used)
    stored = state_shardings(run, mesh)
    places = zip(jax.tree.leaves(new[0]), jax.tree.leaves(stored), strict=True)
    assert all(value.sharding.is_equivalent_to(place, value.ndim) for value, place in places)
    return drawn.leaves(new)


@functools.cache
def on_one_device(model: Model):
    return stepped(v3_run(model), None)


@pytest.mark.parametrize("name", MESHES)
def test_a_step_is_the_same_on_every_mesh(name):
    compare_a_step(drawn.model(repeat=2), MESHES[name])


def test_compressed_queries_and_experts_in_mtp_too():
    model = drawn.model(repeat=1, q_lora_rank=8, mtp_experts=True)
    compare_a_step(model, {"context": 2, "tensor": 2, "expert": 2})


def compare_a_step(model: Model, mesh: dict[str, int]) -> None:
    known = on_one_device(model)
    found = stepped(v3_run(model), sharding.make_mesh(**mesh))
    assert found.keys() == known.keys()
    start = drawn.leaves((drawn.state(v3_run(model), SEED), {}))
    for path, value in known.items():
        # The first moment is a tenth of the gradient.
        assert rel_err(found[path], value) < 10 * TOLERANCE["f32"], path
        if ".mu" in path:
            assert value.any() or "bias" in path, path
    moved = [p for p in known if ".model" in p and (known[p] != start[p]).any()]
    assert len(moved) == sum(".model" in p for p in known)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"mesh.data=3 mesh.fsdp=1 .* does not make use of all 8 devices"),
        ({"data": 3, "fsdp": -1}, "does not make use of all 8 devices"),
        ({"data": -1, "fsdp": -1}, r"at most one may be -1 \(the rest\)"),
        ({"expert": 0}, "sizes must be positive"),
        ({"tensor": -2}, "sizes must be positive"),
    ],
    ids=str,
)
def test_make_mesh_says_what_does_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_make_mesh_fills_the_rest_and_keeps_every_axis():
    mesh = sharding.make_mesh(expert=2, fsdp=-1)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}
    fields = MeshShape.__dataclass_fields__
    assert tuple(fields) == sharding.AXES == tuple(mesh.axis_names)


def test_a_dimension_that_does_not_divide_is_named():
    model = abstract(drawn.model(experts=4, router=SoftmaxRouter()))
    with pytest.raises(ValueError, match=r"experts.*dimension of 4, .* expert=8; choose a divisor"):
        sharding.shardings(model, sharding.make_mesh(expert=8))


def test_weights_are_stored_cut_and_computed_gathered():
    model = abstract(drawn.model())
    weight = model.layers[0].blocks[0].ffn.experts.gate_up_proj
    assert weight.get_value().shape == (2, 8, 16, 2, 8)
    with jax.set_mesh(sharding.make_mesh(expert=2, fsdp=2, tensor=2)):
        owners = ("expert", "tensor")
        assert sharding.stored_spec(weight) == jax.P(None, owners, ("fsdp",), None, None)
        assert sharding.compute_spec(weight) == jax.P(None, owners, None, None, None)
    with jax.set_mesh(sharding.make_mesh(fsdp=8)):
        assert sharding.stored_spec(weight) == jax.P(None, None, "fsdp", None, None)


def test_one_device_needs_no_collective():
    run = v3_run(drawn.model(repeat=1))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = make_train_step(run)
        lowered = step.lower(drawn.state(run, SEED), drawn.batch(1, micros=1), jnp.int32(1))
    text = lowered.as_text()
    assert "dot_general" in text
    assert not re.search("all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute", text)


def test_helpers_do_nothing_without_a_mesh():
    x = jnp.arange(6.0).reshape(2, 3)
    assert not sharding.active() and sharding.axis_size("expert") == 1
    assert sharding.reshard(x, "batch", None) is x
    assert sharding.varying(x, "data") is x
    assert sharding.local(losses.ahead, None, None) is losses.ahead
    product = sharding.einsum("BT,DT->BD", x, x, axes=("batch", None))
    np.testing.assert_array_equal(product, np.asarray(x) @ np.asarray(x).T)
