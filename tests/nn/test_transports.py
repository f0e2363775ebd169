"""However rows travel to their experts, the layer is the one that a single device computes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import sharding
from dsjax.config import Moe, SigmoidRouter
from dsjax.nn import precision
from dsjax.nn.dispatch import TRANSPORTS, ragged, rounds, transport_for
from dsjax.nn.dispatch.rows import Group
from dsjax.nn.moe import MoeFfn
from pallas_kernels.grouped_matmul.reference import reference
from tests.tolerance import TOLERANCE, rel_err

B, T, D, E, K, F = 8, 40, 8, 16, 2, 8
ROUTER = SigmoidRouter(num_groups=8, kept_groups=2, scale=2.5)
# What the bias makes of the load: as it comes, all to two neighbours (on one device), half to one
# expert, and most experts empty.
BIASES = {
    "free": np.zeros(E),
    "all on one device": np.where(np.isin(np.arange(E), [6, 7]), 9.0, 0.0),
    "one expert has half": np.where(np.arange(E) == 13, 9.0, 0.0),
    "most experts empty": np.where(np.arange(E) % 5, -9.0, 0.0),
}
MESHES = {
    "expert 8": {"expert": 8},
    "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
    "expert 2, tensor 4": {"expert": 2, "tensor": 4},
    "data 2, expert 2, context 2": {"data": 2, "expert": 2, "context": 2},
}
pytestmark = pytest.mark.usefixtures("uncached")


def emulated(operand, output, from_A, sent_A, to_A, got_A, *, axis_name):
    """What `lax.ragged_all_to_all` documents, for CPU: everything everywhere, then a choice."""
    del got_A
    rank = jax.lax.axis_index(axis_name)
    of_all = [jax.lax.all_gather(x, axis_name) for x in (operand, from_A, sent_A, to_A)]

    def received(output, of_one):
        operand, from_A, sent_A, to_A = of_one
        behind = jnp.arange(output.shape[0], dtype=jnp.int32) - to_A[rank]
        mine = ((behind >= 0) & (behind < sent_A[rank])).reshape(-1, *[1] * (output.ndim - 1))
        return jnp.where(mine, operand.at[from_A[rank] + behind].get(mode="clip"), output), None

    return jax.lax.scan(received, output, of_all)[0]


@pytest.fixture(autouse=True)
def quick_to_compile(monkeypatch):
    """The product of the experts has tests of its own, and takes most of the time to compile."""
    monkeypatch.setattr(precision, "grouped_matmul", reference)
    monkeypatch.setitem(TRANSPORTS, "ragged", functools.partial(ragged, collective=emulated))


def layer(seed: int) -> MoeFfn:
    """Float64; call inside `jax.enable_x64`."""
    rng = np.random.default_rng(seed)
    config = Moe(num_experts=E, num_chosen=K, num_shared=1, intermediate_size=F, router=ROUTER)
    module = MoeFfn(config, D, std=1.0, rngs=nnx.Rngs(0))
    return jax.tree.map(
        lambda v: v.replace(jnp.asarray(rng.standard_normal(v.get_value().shape))),
        module,
        is_leaf=sharding.is_variable,
    )


def outcome(module: MoeFfn, x_BTD, along_BTD, counted_BT):
    """Gradients in weights and input, the output, and the statistics."""

    def value(module, x_BTD):
        y_BTD, stats = sharding.unshard(module)(x_BTD, counted_BT)
        return (y_BTD * along_BTD).sum() + stats.balance_B.sum(), (y_BTD, stats)

    return jax.grad(value, argnums=(0, 1), has_aux=True)(module, x_BTD)


on_one_device = jax.jit(outcome)


def compare(
    sizes: dict[str, int], seed: int, *, name: str, batch: int = B, length: int = T
) -> None:
    """On the mesh against one device, under every bias."""
    rng = np.random.default_rng(seed)
    together = jax.jit(lambda *args: outcome(*args))
    with jax.enable_x64(True):
        module, mesh = layer(seed), sharding.make_mesh(**sizes)
        x_BTD, along_BTD = jnp.asarray(rng.standard_normal((2, batch, length, D)))
        counted_BT = jnp.asarray(rng.random((batch, length)) < 0.9)
        for bias, bias_E in BIASES.items():
            module.router.bias[...] = jnp.asarray(bias_E)
            expected = on_one_device(module, x_BTD, along_BTD, counted_BT)
            with jax.set_mesh(mesh), sharding.layout(sharding.Layout(name)):
                place = sharding.spec("batch", sharding.residual(length))
                found = together(
                    jax.device_put(module, sharding.shardings(module, mesh)),
                    *jax.device_put((x_BTD, along_BTD, counted_BT), jax.NamedSharding(mesh, place)),
                )
            check(found, expected, bias)


def check(found, expected, bias: str) -> None:
    found, expected = (dict(jax.tree_util.tree_leaves_with_path(x)) for x in (found, expected))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        where = f"{bias}: {jax.tree_util.keystr(path)}"
        assert rel_err(found[path], value) < TOLERANCE["f64"], where
        assert np.any(value) or "bias" in where or "dropped" in where, where


def first(cases, *chosen):
    """The `chosen` cases belong to the default suite."""
    return [
        pytest.param(
            *case, marks=() if case in chosen else pytest.mark.thorough, id=" ".join(map(str, case))
        )
        for case in cases
    ]


@pytest.mark.parametrize(
    ("name", "mesh"),
    first(
        itertools.product(TRANSPORTS, MESHES),
        ("ring", "data 2, expert 2, context 2"),
        ("all_to_all", "expert 2, tensor 4"),
        ("ragged", "fsdp 2, expert 4"),
    ),
)
def test_output_and_every_gradient_as_on_one_device(name, mesh, seed):
    compare(MESHES[mesh], seed, name=name)


@pytest.mark.parametrize(
    ("name", "length"),
    first([("ring", 1), ("all_to_all", 1), ("all_to_all", 5), ("ragged", 5)], ("all_to_all", 5)),
)
def test_tokens_that_cannot_be_cut_over_tensor(name, length, seed):
    """As in decoding: two devices share out one row, or five, that both of them hold."""
    compare({"data": 2, "expert": 2, "tensor": 2}, seed, name=name, batch=4, length=length)


def abstract(mesh: jax.sharding.Mesh, *, rows: int = T):
    """A layer and `rows` tokens on each device of the mesh, in FP32, without values."""
    module = jax.eval_shape(lambda: layer(0))
    places = sharding.shardings(module, mesh)
    there = jax.NamedSharding(mesh, sharding.spec("batch"))
    return (
        jax.tree.map(
            lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), module, places
        ),
        jax.ShapeDtypeStruct((mesh.size, rows, D), jnp.float32, sharding=there),
    )


def gradients(module: MoeFfn, x_BTD):
    def value(module, x_BTD):
        y_BTD, stats = sharding.unshard(module)(x_BTD, jnp.ones_like(x_BTD[..., 0], bool))
        return (y_BTD**2).sum(), stats

    return jax.grad(value, argnums=(0, 1), has_aux=True)(module, x_BTD)


# In the loop over rounds: there with rows, choices and weights, back with sums. In backward's loop
# the three of the way there again, and the gradients of sums, rows and weights. The gate's and
# the shared expert's two weights are gathered and scattered besides.
@pytest.mark.parametrize(
    ("name", "op", "count"),
    [
        ("all_to_all", "stablehlo.all_to_all", 4 + 3 + 3),
        ("ragged", "stablehlo.custom_call @ragged_all_to_all", 4 + 3 + 3),
        ("ring", "stablehlo.all_gather", 3 + 1 + 3),
        ("ring", "stablehlo.reduce_scatter", 1 + 2 + 3),
    ],
)
def test_collectives_of_forward_and_backward(name, op, count, monkeypatch):
    """Lowered for TPU, where the ragged one exists too, by the real `lax.ragged_all_to_all`."""
    monkeypatch.setitem(TRANSPORTS, "ragged", ragged)
    mesh = sharding.make_mesh(expert=8)
    with jax.set_mesh(mesh), sharding.layout(sharding.Layout(name)):
        traced = jax.jit(gradients).trace(*abstract(mesh))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count(op) == count


def test_rounds_beyond_the_first_are_taken(monkeypatch):
    """All 8 x 40 rows and 640 pairs go to one device: far more than it has room for."""
    seen, real = [], rounds._sum

    def watched(step, floats, ints, num_rounds):
        where = step.__qualname__.partition(".")[0]
        jax.debug.callback(lambda number: seen.append((where, int(number))), num_rounds)
        return real(step, floats, ints, num_rounds)

    monkeypatch.setattr(rounds, "_sum", watched)
    mesh = sharding.make_mesh(expert=8)
    module = layer(0)
    module.router.bias[...] = jnp.asarray(BIASES["all on one device"], jnp.float32)
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
    most = {}
    for name in TRANSPORTS:
        with jax.set_mesh(mesh), sharding.layout(sharding.Layout(name)):
            there = jax.NamedSharding(mesh, sharding.spec("batch"))
            _, stats = jax.jit(lambda m, x: sharding.unshard(m)(x, jnp.ones_like(x[..., 0], bool)))(
                jax.device_put(module, sharding.shardings(module, mesh)),
                jax.device_put(x_BTD, there),
            )
            assert stats.dropped == 0
        jax.effects_barrier()
        most[name] = {where: max(n for at, n in seen if at == where) for where, _ in seen}
        seen.clear()
    # Even shares are 80 pairs, 10 rows for each device, and 80 rows from all: room is made for 136,
    # 32 and 136. Then 256 rows come at once to the all-to-all's experts, and 136 to the ragged's.
    assert most == {
        "ring": {"through_experts": 5},
        "all_to_all": {"all_to_all": 2, "through_experts": 4},
        "ragged": {"ragged": 3, "through_experts": 2},
    }


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_sum_over_rounds_and_its_gradient(number, seed):
    rng = np.random.default_rng(seed)
    offsets = jnp.arange(5, dtype=jnp.int32)

    def step(index, floats, offsets):
        x_MD, w_DD = floats
        return jnp.sin(x_MD @ w_DD + offsets[index].astype(x_MD.dtype)), index + 1

    def plain(floats):
        steps = [step(jnp.int32(r), floats, offsets) for r in range(number)]
        return sum(y for y, _ in steps), sum(count for _, count in steps)

    def rounded(floats):
        return rounds.over_rounds(step, floats, offsets, jnp.int32(number), most=5)

    with jax.enable_x64(True):
        floats = tuple(jnp.asarray(rng.standard_normal(shape)) for shape in ((3, 4), (4, 4)))
        along = jnp.asarray(rng.standard_normal((3, 4)))
        expected, pull, known = jax.vjp(plain, floats, has_aux=True)
        for found, pull_found, count in (
            jax.vjp(rounded, floats, has_aux=True),
            jax.vjp(jax.checkpoint(rounded), floats, has_aux=True),
        ):
            assert rel_err(found, expected) < TOLERANCE["f64"] and count == known
            pairs = zip(pull_found(along)[0], pull(along)[0], strict=True)
            assert all(rel_err(a, b) < TOLERANCE["f64"] for a, b in pairs)
        assert rel_err(rounded(floats)[0], expected) < TOLERANCE["f64"]


def test_memory_does_not_grow_with_the_pairs_of_the_group(monkeypatch):
    """What each device adds to a ring is its rows, a few times over, and not its pairs."""
    monkeypatch.setattr(precision, "grouped_matmul", lambda x, w, sizes: x @ w[0])
    rows, dim = 256, 64
    config = Moe(num_experts=E, num_chosen=4, num_shared=0, intermediate_size=8, router=ROUTER)
    module = jax.eval_shape(lambda: MoeFfn(config, dim, std=1.0, rngs=nnx.Rngs(0)))

    def temporary(size: int) -> int:
        mesh = sharding.make_mesh(expert=size, devices=jax.devices()[:size])
        with jax.set_mesh(mesh), sharding.layout(sharding.Layout("ring")):
            placed = jax.tree.map(
                lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s),
                module,
                sharding.shardings(module, mesh),
            )
            there = jax.NamedSharding(mesh, sharding.spec("batch"))
            x_BTD = jax.ShapeDtypeStruct((size, rows, dim), jnp.float32, sharding=there)
            compiled = jax.jit(gradients).lower(placed, x_BTD).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    pairs_of_one = rows * 4 * dim * 4
    assert temporary(8) - temporary(2) < 6 * pairs_of_one


def test_the_transport_is_chosen_by_how_far_rows_spread():
    def chosen(fan_out: int) -> str:
        return transport_for(Group(axes=("expert", "tensor"), num_local=2, fan_out=fan_out))

    with jax.set_mesh(sharding.make_mesh(expert=4, tensor=2)):
        assert [chosen(8), chosen(7), chosen(6)] == ["ring", "ring", "all_to_all"]


def test_an_unknown_transport_is_refused():
    with (
        jax.set_mesh(sharding.make_mesh(expert=8)),
        sharding.layout(sharding.Layout("pigeon")),
        pytest.raises(ValueError, match="dispatch='pigeon'; there are auto, all_to_all, ragged"),
    ):
        jax.eval_shape(gradients, *abstract(jax.sharding.get_mesh()))
