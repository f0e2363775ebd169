"""One device and eight virtual ones compute the same: loss, gradients, and the next state."""

import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import losses, sharding
from dsjax.config import Model, SoftmaxRouter
from dsjax.model import abstract
from dsjax.params import RouterBias, normal
from dsjax.plan.counting import count
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


def v3_run(model: Model, remat: str = "full") -> Run:
    # Adam with an eps that large makes the first update the gradient itself, up to a factor; and
    # with that rate an error in it would show in the weights.
    rate = LearningRate(peak=1.0, warmup_steps=0)
    return drawn.run(
        model,
        optim=Optim(learning_rate=rate, eps=1.0, beta2=0.0, clip_norm=1e9),
        remat=remat,
    )


def stepped(run: Run, mesh: jax.sharding.Mesh | None):
    """Values after one step on packed rows, (state, metrics), and the text of the program."""
    state, batch, used = drawn.state(run, SEED), drawn.batch(1, micros=2), jnp.int32(2)
    step = make_train_step(run)
    if mesh is None:
        compiled = step.lower(state, batch, used).compile(drawn.FAST_COMPILE)
        return drawn.leaves(compiled(state, batch, used)), compiled.as_text()
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
    return drawn.leaves(new), compiled.as_text()


@functools.cache
def on_one_device(run: Run):
    return stepped(run, None)


def test_a_step_is_the_same_on_a_mesh():
    # Without recomputing there is less to compile; the others below recompute.
    compare_a_step(drawn.model(repeat=2), {"data": 2, "fsdp": 2, "expert": 2}, remat="none")


@pytest.mark.thorough
@pytest.mark.parametrize("name", MESHES)
def test_a_step_is_the_same_on_every_mesh(name):
    compare_a_step(drawn.model(repeat=2), MESHES[name])


@pytest.mark.thorough
def test_compressed_queries_and_experts_in_mtp_too():
    model = drawn.model(repeat=1, q_lora_rank=8, mtp_experts=True)
    compare_a_step(model, {"context": 2, "tensor": 2, "expert": 2})


def compare_a_step(model: Model, mesh: dict[str, int], remat: str = "full") -> None:
    run = v3_run(model, remat)
    known, _ = on_one_device(run)
    found, program = stepped(run, sharding.make_mesh(**mesh))
    if mesh in ({"fsdp": 8}, {"expert": 8}):
        check_traffic(program, model, by_experts="expert" in mesh)
    assert found.keys() == known.keys()
    start = drawn.leaves((drawn.state(run, SEED), {}))
    for path, value in known.items():
        # The first moment is a tenth of the gradient.
        assert rel_err(found[path], value) < 10 * TOLERANCE["f32"], path
        if ".mu" in path:
            assert value.any() or "bias" in path, path
    moved = [p for p in known if ".model" in p and (known[p] != start[p]).any()]
    assert len(moved) == sum(".model" in p for p in known)


def test_logits_of_rows_that_lie_in_sequence():
    """As evaluation has them: cut over `context`, but not in zigzag."""
    run = v3_run(drawn.model(repeat=1, mtp=0))
    model, tokens = drawn.state(run, SEED).model, drawn.batch(1).tokens_BT[0]
    expected = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    mesh = sharding.make_mesh(context=2, expert=4)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, sharding.shardings(model, mesh))
        tokens = sharding.reshard(tokens, "batch", "length")
        found = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert rel_err(found, expected) < TOLERANCE["f32"]


def check_traffic(program: str, model: Model, *, by_experts: bool) -> None:
    """ZeRO-3's promise: weights are gathered for forward and for backward, their gradients summed
    once, each device's piece of them; of the embedding only tokens are gathered, and experts stay
    where they are by `expert`.
    """
    cut = {"embed"} if by_experts else {"embed", "expert_embed"}

    def size(module, of=lambda variable: True) -> int:
        weights = jax.tree.leaves(module, is_leaf=sharding.is_variable)
        return sum(4 * v.get_value().size for v in weights if of(v))

    def is_cut(variable) -> bool:
        return not cut.isdisjoint(variable.axes)

    def is_summed(variable) -> bool:
        by_own_device = by_experts and "experts" in variable.axes
        return not (by_own_device or isinstance(variable, RouterBias))

    weights, depths = abstract(model), 1 + len(model.mtp)
    head, tokens = size(weights.lm_head), 4 * 8 * 16
    layers = [*weights.layers, *weights.mtp]
    sent = count(program).traffic
    # MTP's embedding is computed again in backward.
    gathered = sum(2 * size(layer, is_cut) for layer in layers) + head + (2 * depths - 1) * tokens
    assert sent["all-gather"].payload == gathered
    scattered = size(layers, is_cut) + head
    assert sent["reduce-scatter"].payload == scattered
    summed = size(layers, lambda v: is_summed(v) and not is_cut(v)) + size(weights.norm)
    # And some numbers: losses, loads, norms of the gradients.
    assert 0 <= sent["all-reduce"].payload - summed < 400


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


def slices_of_v5p(number: int) -> list:
    """The devices of `number` TPU slices of 2x2x2 chips, all that a mesh is arranged by."""
    return [
        mock.Mock(
            spec=jax.Device,
            platform="tpu",
            device_kind="TPU v5p",
            slice_index=place // 8,
            coords=[place >> bit & 1 for bit in range(3)],
            core_on_chip=0,
        )
        for place in range(8 * number)
    ]


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 2}, "data"),
        ({"fsdp": 8, "context": 2}, "fsdp"),
        ({"expert": 16}, "expert"),  # as experts of 128 GPUs lie
        # Two of the four slices by each.
        ({"data": 2, "fsdp": 2, "expert": 2, "tensor": 4}, "data fsdp"),
    ],
    ids=str,
)
def test_the_first_axes_cross_from_slice_to_slice(sizes, crossing):
    shape = [sizes.get(name, 1) for name in sharding.AXES]
    mesh = sharding.make_mesh(slices_of_v5p(math.prod(shape) // 8), **sizes)
    places = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    changing = [
        name for axis, name in enumerate(sharding.AXES) if (places != places.take([0], axis)).any()
    ]
    assert changing == crossing.split()
    # Half of an axis, not every other device of it.
    assert all((np.diff(places, axis=axis) >= 0).all() for axis in range(places.ndim))


@pytest.mark.parametrize(
    "sizes", [{"tensor": 16}, {"context": 16}, {"tensor": 8, "context": 2}], ids=str
)
def test_neither_heads_nor_sequences_reach_into_another_slice(sizes):
    told = r"laid over 2 slices.*make mesh.data, fsdp or expert 2 times as large"
    with pytest.raises(ValueError, match=told):
        sharding.make_mesh(slices_of_v5p(2), **sizes)


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


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_gathered_in_stages_and_its_gradient(stage, axis, monkeypatch):
    monkeypatch.setattr(sharding, "_first_stage", lambda mesh_axes: stage)
    axes = ("embed", None) if axis == 0 else (None, "embed")
    weight = normal(nnx.Rngs(0), (16, 24), axes, std=1.0)
    w_XY = np.asarray(weight[...])
    # What every row adds to the gradient: rows lie on different devices.
    along_BXY = np.random.default_rng(SEED).standard_normal((8, 16, 24)).astype(np.float32)

    def loss(weight, along_BXY):
        whole_XY = sharding.unshard(weight)[...]
        return jnp.einsum("BXY,XY->B", along_BXY, whole_XY).sum()

    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)
    with jax.set_mesh(mesh):
        weight = jax.device_put(weight, sharding.shardings(weight, mesh))
        along = sharding.reshard(jnp.asarray(along_BXY), "batch", None, None)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(weight, along).compile()
        value, grad = compiled(weight, along)
    np.testing.assert_allclose(value, (along_BXY * w_XY).sum(dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(grad[...], along_BXY.sum(0), rtol=1e-5, atol=1e-5)
    sent = count(compiled.as_text()).traffic
    assert (sent["all-gather"].ops, sent["reduce-scatter"].ops) == (stage, stage)


def test_where_gathers_go_in_stages():
    """Along all of a torus of three dimensions, by what libtpu makes of it."""

    def first_stage(kind: str, **axes: int) -> int:
        device = jax.sharding.AbstractDevice(kind, num_cores=1, platform="tpu")
        sizes = tuple(axes.get(name, 1) for name in sharding.AXES)
        explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
        mesh = jax.sharding.AbstractMesh(
            sizes, sharding.AXES, axis_types=explicit, abstract_device=device
        )
        with jax.sharding.use_abstract_mesh(mesh):
            return sharding._first_stage(tuple(axes))

    assert first_stage("TPU v5", expert=128) == first_stage("TPU7x", fsdp=2, expert=32) == 8
    assert first_stage("TPU v5", expert=32) == 1
    assert first_stage("TPU v5 lite", fsdp=128) == first_stage("NVIDIA H200", expert=128) == 1


def test_helpers_do_nothing_without_a_mesh():
    x = jnp.arange(6.0).reshape(2, 3)
    assert not sharding.active() and sharding.axis_size("expert") == 1
    assert sharding.reshard(x, "batch", None) is x
    assert sharding.varying(x, "data") is x
    assert sharding.local(losses.ahead, None, None) is losses.ahead
    product = sharding.einsum("BT,DT->BD", x, x, axes=("batch", None))
    np.testing.assert_array_equal(product, np.asarray(x) @ np.asarray(x).T)
