"""Every implementation of the grouped product against NumPy float64, values and both gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import select
from pallas_kernels.chip import interpreted
from pallas_kernels.fp8_matmul.gpu import in_bands
from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, WGRADS, grouped_matmul, grouped_wgrad
from tests.kernels.backends import run
from tests.tolerance import TOLERANCE, rel_err

# Name -> (rows, K, N, group sizes); rows beyond the sum belong to no group.
SHAPES = {
    "even": (32, 8, 16, [8, 8, 8, 8]),
    "empty groups": (24, 5, 7, [0, 9, 0, 0, 15, 0]),
    "one huge group": (300, 3, 5, [1, 298, 1]),
    "all in the last": (40, 4, 4, [0, 0, 40]),
    "rows behind": (50, 6, 3, [7, 0, 20]),
    "no row in any group": (16, 4, 4, [0, 0]),
    "odd sizes": (37, 13, 11, [3, 17, 1, 9, 7]),
    "one group": (19, 2, 3, [19]),
    "one row": (1, 3, 2, [0, 1, 0]),
    "no rows": (0, 3, 2, [0, 0]),
}
# The kernel is for BF16 on a chip, and has shapes of its own below.
ANYWHERE = [name for name in IMPLEMENTATIONS if name != "gpu"]
NAMES = [*ANYWHERE, None]


def drawn(shape: str, seed: int):
    rows, inner, outer, sizes = SHAPES[shape]
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((rows, inner)), rng.standard_normal((len(sizes), inner, outer))
    return x, w, np.array(sizes, np.int32), rng.standard_normal((rows, outer))


def plain(x: np.ndarray, w: np.ndarray, sizes: np.ndarray, grad: np.ndarray):
    """Value, gradient of x, gradient of w: one matrix product per group."""
    y, grad_x, grad_w = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(sizes):
        mine = slice(start, start + size)
        y[mine] = x[mine] @ w[group]
        grad_x[mine] = grad[mine] @ w[group].T
        grad_w[group] = x[mine].T @ grad[mine]
        start += size
    return y, grad_x, grad_w


def ours(name: str | None, x, w, sizes, grad, dtype):
    x, w, grad = (jnp.asarray(a, dtype) for a in (x, w, grad))

    def with_gradients(x, w, sizes, grad, implementation):
        y, back = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w
        )
        return y, *back(grad)

    return run(name, with_gradients, x, w, jnp.asarray(sizes), grad)


@pytest.mark.parametrize(
    ("shape", "name"), [*itertools.product(SHAPES, ANYWHERE), ("odd sizes", None)]
)
def test_values_and_gradients(name, shape, seed):
    inputs = drawn(shape, seed)
    found = ours(name, *inputs, jnp.float32)
    for one, exact, what in zip(found, plain(*inputs), ["y", "grad x", "grad w"], strict=True):
        assert one.dtype == jnp.float32
        assert rel_err(one, exact) < TOLERANCE["f32"], what


@pytest.mark.parametrize("name", ANYWHERE)
def test_float64_is_kept(name, seed):
    inputs = drawn("odd sizes", seed)
    with jax.enable_x64(True):
        found = ours(name, *inputs, jnp.float64)
    for one, exact in zip(found, plain(*inputs), strict=True):
        assert rel_err(one, exact) < TOLERANCE["f64"]


@pytest.mark.parametrize("name", ["blocks", "ragged_dot"])
def test_bfloat16_is_summed_in_float32(name, seed):
    rng = np.random.default_rng(seed)
    sizes = np.array([300, 0, 212], np.int32)
    inputs = rng.standard_normal((512, 64)), rng.standard_normal((3, 64, 8)), sizes
    inputs = (*inputs, rng.standard_normal((512, 8)))
    assert_rounded_once(ours(name, *inputs, jnp.bfloat16), plain(*in_bf16(*inputs)))


def in_bf16(x, w, sizes, grad):
    x, w, grad = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w, grad))
    return x, w, sizes, grad


def assert_rounded_once(found, expected):
    for one, exact, what in zip(found, expected, ["y", "grad x", "grad w"], strict=True):
        assert one.dtype == jnp.bfloat16
        assert rel_err(one, exact) < TOLERANCE["bf16"] / 2, what


@pytest.mark.parametrize("name", [*(name for name in WGRADS if name != "gpu"), None])
@pytest.mark.parametrize("shape", ["odd sizes", "rows behind", "one huge group"])
def test_weight_gradient_alone(name, shape, seed):
    x, w, sizes, grad = drawn(shape, seed)
    short = jnp.asarray(grad, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16)
    call = jax.jit(lambda *a: grouped_wgrad(*a, implementation=name))
    found = call(*(one.astype(jnp.float32) for one in short), jnp.asarray(sizes))
    _, _, exact = plain(
        np.asarray(short[1], np.float64), w, sizes, np.asarray(short[0], np.float64)
    )
    assert rel_err(found, exact.swapaxes(1, 2)) < TOLERANCE["f32"]
    # BF16 in, FP32 out: nothing is rounded on the way.
    assert rel_err(call(*short, jnp.asarray(sizes)), exact.swapaxes(1, 2)) < TOLERANCE["f32"]


@pytest.mark.parametrize("rows", [50, 8])  # in blocks, and in tiles alone
@pytest.mark.parametrize("name", NAMES)
def test_nan_behind_the_last_group_reaches_nothing(name, rows, seed):
    sizes = np.array([1, 0, 4], np.int32)
    rng = np.random.default_rng(seed)
    x, w, grad = (rng.standard_normal(shape) for shape in ((rows, 6), (3, 6, 3), (rows, 3)))
    expected = plain(x, w, sizes, grad)
    x[5:], grad[5:] = np.nan, np.nan
    for one, exact in zip(ours(name, x, w, sizes, grad, jnp.float32), expected, strict=True):
        assert rel_err(one, exact) < TOLERANCE["f32"]


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_group(name, seed):
    x, w, sizes, grad = drawn("odd sizes", seed)
    x[4] = np.nan  # of the second group
    expected = plain(x, w, sizes, grad)
    for one, exact in zip(ours(name, x, w, sizes, grad, jnp.float32), expected, strict=True):
        assert (np.isnan(one) == np.isnan(exact)).all()


# (rows, K, N, sizes), K and N by 64: several steps, an edge that cuts a tile, an odd number of
# rows, empty groups, one that has nearly all, rows behind; a tile twice as wide.
SKEWED, WIDE = (141, 128, 192, [0, 129, 0, 3]), (3, 64, 256, [1, 2])


def drawn_for_gpu(rows, K, N, sizes, seed):
    rng = np.random.default_rng(seed)
    x, w, grad = (rng.standard_normal(s) for s in ((rows, K), (len(sizes), K, N), (rows, N)))
    return x, w, np.array(sizes, np.int32), grad


@pytest.mark.parametrize(
    "shape",
    [
        *(SKEWED, WIDE),
        pytest.param((300, 192, 512, [10, 0, 261]), marks=pytest.mark.thorough),
        pytest.param((200, 64, 320, [0, 200, 0]), marks=pytest.mark.thorough),
    ],
)
def test_gpu_kernels(shape, seed):
    inputs = drawn_for_gpu(*shape, seed)
    assert_rounded_once(ours("gpu", *inputs, jnp.bfloat16), plain(*in_bf16(*inputs)))


# Behind a tile that is not full; behind one that is, where a tile of no group begins.
@pytest.mark.parametrize(("rows", "sizes"), [(8, [0, 1, 4]), (130, [0, 128])])
def test_gpu_kernels_look_at_nothing_behind_the_last_group(rows, sizes, seed):
    x, w, sizes, grad = drawn_for_gpu(rows, 64, 64, sizes, seed)
    expected = plain(*in_bf16(x, w, sizes, grad))
    x[sizes.sum() :], grad[sizes.sum() :], w[0] = np.nan, np.nan, np.nan
    assert_rounded_once(ours("gpu", x, w, sizes, grad, jnp.bfloat16), expected)


def test_gpu_weight_gradient_is_summed_in_float32(seed):
    x, w, sizes, grad = in_bf16(*drawn_for_gpu(141, 64, 64, [0, 129, 0, 3], seed))
    operands = *(jnp.asarray(one, jnp.bfloat16) for one in (grad, x)), jnp.asarray(sizes)
    found = run("gpu", grouped_wgrad, *operands)
    assert found.dtype == jnp.float32
    assert rel_err(found, plain(x, w, sizes, grad)[2].swapaxes(1, 2)) < TOLERANCE["f32"]


def test_programs_share_the_tiles(seed):
    x, w, sizes, grad = in_bf16(*drawn_for_gpu(6, 64, 512, [2, 1, 3], seed))  # six tiles
    x_MK, w_GKN, dy = (jnp.asarray(one, jnp.bfloat16) for one in (x, w, grad))
    with interpreted("gpu", programs=4), select.prefer("gpu"):
        y = np.asarray(jax.jit(grouped_matmul)(x_MK, w_GKN, jnp.asarray(sizes)))
        dw = np.asarray(jax.jit(grouped_wgrad)(dy, x_MK, jnp.asarray(sizes)))
    exact, _, exact_dw = plain(x, w, sizes, grad)
    assert rel_err(y, exact) < TOLERANCE["bf16"] / 2
    assert rel_err(dw, exact_dw.swapaxes(1, 2)) < TOLERANCE["f32"]


@pytest.mark.parametrize(("down", "across"), [(1, 3), (7, 2), (8, 3), (16, 2), (21, 5)])
def test_bands_are_those_of_jax(down, across):
    number_T = jnp.arange(down * across, dtype=jnp.int32)
    ours = jax.vmap(lambda number: in_bands(number, down, across))(number_T)
    theirs = jax.vmap(lambda number: plgpu.planar_snake(number, (down, across), 0, 8))(number_T)
    assert np.array_equal(ours, theirs)


def on_chip(kind: str):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((2,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    return mesh, jax.sharding.use_abstract_mesh(mesh)


def test_the_gpu_kernel_says_what_it_does_not_do():
    x, w, sizes = jnp.zeros((4, 64)), jnp.zeros((2, 64, 128)), jnp.zeros(2, jnp.int32)
    short = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)

    def refused(why, x, w):
        for call, operands in ((grouped_matmul, (x, w)), (grouped_wgrad, (x, x))):
            with pytest.raises(select.Unsupported, match=why) as caught:
                call(*operands, sizes, implementation="gpu")
            assert str(caught.value).endswith(
                "name another implementation, or leave it to the default"
            )

    refused("gpu wants an NVIDIA Hopper GPU, here is 'cpu'; name an", *short)
    with on_chip("NVIDIA B200")[1]:
        refused("gpu wants an NVIDIA Hopper GPU, here is 'NVIDIA B200'", *short)
    with interpreted("gpu"):
        refused("gpu wants operands of bfloat16, got float32 and float32", x, w)
        x, w = short
        refused(r"last dimensions by 64; got \(4, 32\) and ", x[:, :32], w[:, :32])
        refused(r"wants at least one number.* got \(0, 64\) and ", x[:0], w)
        with pytest.raises(select.Unsupported, match=r"by 64; got \(4, 64\) and \(2, 64, 72\)"):
            grouped_matmul(x, w[..., :72], sizes, implementation="gpu")


def test_the_gpu_kernel_runs_where_it_is_named_alone():
    x, w, sizes = jnp.zeros((4, 64)), jnp.zeros((2, 64, 128)), jnp.zeros(2, jnp.int32)
    operands = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), sizes

    def program():
        return str(jax.make_jaxpr(lambda *a: grouped_matmul(*a))(*operands))

    with on_chip("NVIDIA H200")[1]:
        assert "wgmma" not in program()
        with select.prefer("gpu"):
            assert "wgmma" in program()


def test_gpu_gradients_can_be_traced_per_device():
    mesh, here = on_chip("NVIDIA H200")

    def gradients(x, w, sizes):
        def layer(x, w):
            return grouped_matmul(x, w, sizes, implementation="gpu").astype(jnp.float32).sum()

        return jax.grad(layer, argnums=(0, 1))(x, w)

    rows, whole = jax.P("d"), jax.P()
    shapes = (256, 128), (4, 128, 64)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with here:
        # Rows of each device by weights that all have: their gradients are summed over devices.
        each = jax.shard_map(
            gradients, mesh=mesh, in_specs=(rows, whole, rows), out_specs=(rows, whole)
        )
        found = jax.eval_shape(each, *arguments, jax.ShapeDtypeStruct((8,), jnp.int32))
    assert tuple(one.shape for one in found) == shapes


def test_a_wrong_answer_is_seen(seed):
    x, w, sizes, grad = drawn("odd sizes", seed)
    moved = sizes.copy()
    moved[1] -= 1
    moved[2] += 1
    found = ours("blocks", x, w, moved, grad, jnp.float32)
    for one, exact in zip(found, plain(x, w, sizes, grad), strict=True):
        assert not rel_err(one, exact) < TOLERANCE["f32"]


def test_group_sizes_are_data_not_shapes(seed):
    x, w, sizes, grad = drawn("odd sizes", seed)
    traces = []

    @jax.jit
    def run(sizes):
        traces.append(sizes)
        return grouped_matmul(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), sizes)

    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        exact, _, _ = plain(x, w, sizes[order], grad)
        assert rel_err(run(jnp.asarray(sizes[order])), exact) < TOLERANCE["f32"]
    assert len(traces) == 1


def test_errors_name_what_does_not_fit():
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(2, 4, 5\), \(2,\)"):
        grouped_matmul(x, jnp.zeros((2, 4, 5)), sizes)
    with pytest.raises(ValueError, match=r"sizes \[G\]; got .*\(3,\)"):
        grouped_matmul(x, w, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"'cuda'; there are .*'blocks'"):
        grouped_matmul(x, w, sizes, implementation="cuda")
    with pytest.raises(ValueError, match=r"wants w of float32 with 3 dimensions, got bfloat16\(2,"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match=r"wants x of floating with 2 dim.* .*\(1, 4, 3\)"):
        grouped_matmul(x[None], w, sizes)
    with pytest.raises(ValueError, match=r"wants sizes of int32 or int64 .* float32\(2,\); cast"):
        grouped_matmul(x, w, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"wants an out_dtype of bfloat16 or float32, got int8"):
        grouped_wgrad(x, x, sizes, out_dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"grouped_wgrad wants dy .* \(5, 2\), \(4, 3\), \(2,\)"):
        grouped_wgrad(jnp.zeros((5, 2)), x, sizes)
