"""The experts' FP8 layer: its three products against NumPy float64, on one device and several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.fp8_grouped_linear import fp8_grouped_linear, quantize_matrices
from pallas_kernels.quantize import dequantize_rows, quantize_rows
from tests.kernels import fp8_oracle
from tests.kernels.backends import run, same_bits
from tests.tolerance import TOLERANCE, rel_err

ROW, SQUARE = (1, 128), (128, 128)
# Name -> (rows, N, K, group sizes); rows beyond the sum belong to no group.
SHAPES = {
    "skewed, empty, odd, rows behind": (210, 37, 133, [0, 3, 0, 190, 0, 9]),
    "more than a tile": (300, 130, 40, [257, 43]),
    "a whole tile and one row": (257, 8, 8, [128, 129]),
    "whole blocks": (64, 64, 64, [4, 60]),
    "few rows, not all in a group": (3, 8, 16, [0, 1, 0]),
    "no rows": (0, 8, 16, [0, 0]),
}


def drawn(seed: int, shape: str):
    rows, N, K, sizes = SHAPES[shape]
    rng = np.random.default_rng(seed)

    def wide(*size):
        return (rng.standard_normal(size) * np.exp(rng.standard_normal(size))).astype(np.float32)

    return wide(rows, K), wide(len(sizes), N, K), np.array(sizes, np.int32), wide(rows, N)


def rounded(x: np.ndarray, block: tuple[int, int], power_of_two: bool = False) -> np.ndarray:
    return fp8_oracle.dequantize(*fp8_oracle.quantize(x, block, power_of_two), block)


def model(x, w, sizes, dy, *, power_of_two=False, x_power_of_two=False, exact=False):
    """y, dx and dw of the layer's equations with exact sums."""
    y, dx = np.zeros(dy.shape), np.zeros(x.shape)
    dw = np.zeros(w.shape)
    end = 0
    for group, size in enumerate(sizes):
        mine = slice(end, end + size)
        end += size
        matrix = rounded(w[group], SQUARE, power_of_two)
        y[mine] = rounded(x[mine], ROW, x_power_of_two) @ matrix.T
        dx[mine] = rounded(dy[mine], ROW, power_of_two) @ matrix
        if exact:
            dw[group] = dy[mine].T.astype(np.float64) @ x[mine]
        else:
            turned = rounded(x[mine].T, ROW, x_power_of_two)
            dw[group] = rounded(dy[mine].T, ROW, power_of_two) @ turned.T
    return y, dx, dw


def value_and_gradients(x, w, sizes, dy, *, implementation=None, **options):
    def both(x, w, sizes, dy, **options):
        y, back = jax.vjp(lambda x, w: fp8_grouped_linear(x, w, sizes, **options), x, w)
        return y, *back(dy)

    return run(implementation, both, *map(jnp.asarray, (x, w, sizes, dy)), **options)


def compare(found, expected, tolerance=TOLERANCE["f32"]):
    for one, other, what in zip(found, expected, ["y", "dx", "dw"], strict=True):
        assert rel_err(one, other) < tolerance, what


HARDEST = "skewed, empty, odd, rows behind"


@pytest.mark.parametrize(
    "shape",
    [
        HARDEST,
        *(pytest.param(name, marks=pytest.mark.thorough) for name in SHAPES if name != HARDEST),
    ],
)
def test_layer_is_three_fp8_products(shape, seed):
    inputs = drawn(seed, shape)
    compare(value_and_gradients(*inputs), model(*inputs))


@pytest.mark.parametrize(
    "implementation",
    ["reference", *(pytest.param(one, marks=pytest.mark.thorough) for one in ("gpu", "tpu"))],
)
def test_every_implementation_of_the_products(implementation, seed):
    inputs = drawn(seed, "whole blocks")
    compare(value_and_gradients(*inputs, implementation=implementation), model(*inputs))


@pytest.mark.parametrize("x_power_of_two", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_kinds_of_scales(x_power_of_two, seed):
    inputs = drawn(seed, "more than a tile")
    kinds = {"power_of_two": not x_power_of_two, "x_power_of_two": x_power_of_two}
    compare(value_and_gradients(*inputs, **kinds), model(*inputs, **kinds))


def test_scales_of_x_are_like_the_others_by_default(seed):
    inputs = drawn(seed, "a whole tile and one row")
    kinds = {"power_of_two": True, "x_power_of_two": True}
    compare(value_and_gradients(*inputs, power_of_two=True), model(*inputs, **kinds))


def test_exact_weight_gradient(seed):
    inputs = drawn(seed, "skewed, empty, odd, rows behind")
    found = value_and_gradients(*inputs, weight_grad="exact")
    compare(found, model(*inputs, exact=True))


def test_near_the_unquantized_one(seed):
    x, w, sizes, dy = drawn(seed, "more than a tile")
    exact = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for group, mine in enumerate([slice(0, 257), slice(257, 300)]):
        exact[0][mine], exact[1][mine] = x[mine] @ w[group].T, dy[mine] @ w[group]
        exact[2][group] = dy[mine].T @ x[mine]
    # Steps of e4m3 are 2**-3 of the power of two below a number. Half a step at most is 2**-4 /
    # sqrt(3) in the mean square; two factors have sqrt(2) times that; signs are random.
    for one, other in zip(value_and_gradients(x, w, sizes, dy), exact, strict=True):
        assert 2.0**-7 < rel_err(one, other) < 2**0.5 * 2.0**-4 / 3**0.5


def test_dtypes_are_kept(seed):
    x, w, sizes, dy = drawn(seed, "a whole tile and one row")
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    found = value_and_gradients(x, w, sizes, dy)
    assert [one.dtype for one in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    compare(found, model(*(np.asarray(one, np.float32) for one in (x, w)), sizes, dy), 2.0**-8)


@pytest.mark.parametrize("weight_grad", ["fp8", "exact"])
def test_x_is_kept_in_one_byte_a_number(weight_grad, seed):
    x, w, sizes, _ = drawn(seed, "more than a tile")

    def kept(x, w, sizes):
        return jax.vjp(lambda x, w: fp8_grouped_linear(x, w, sizes, weight_grad=weight_grad), x, w)

    _, back = jax.eval_shape(kept, x, w, sizes)
    wide = [one for one in jax.tree.leaves(back) if one.size >= x.size and one.dtype == jnp.float32]
    assert bool(wide) == (weight_grad == "exact")


def test_rows_that_were_sent_in_fp8_stay_as_they_are(seed):
    rng = np.random.default_rng(seed)
    # All sizes of blocks, down to those that no scale is small enough for.
    sizes = 10.0 ** rng.uniform(-9, 9, (500, 1))
    x = jnp.asarray(rng.standard_normal((500, 200)) * sizes, jnp.float32)
    sent = dequantize_rows(*quantize_rows(x, power_of_two=True), jnp.bfloat16)
    again = dequantize_rows(*quantize_rows(sent, power_of_two=True), jnp.bfloat16)
    assert same_bits(np.asarray(again), np.asarray(sent))
    other = dequantize_rows(*quantize_rows(sent), jnp.bfloat16)
    assert not same_bits(np.asarray(other), np.asarray(sent))


@pytest.mark.parametrize(("N", "K"), [(128, 256), (130, 60)])
def test_matrices_are_quantized_one_by_one(N, K, seed):
    w = np.random.default_rng(seed).standard_normal((3, N, K)).astype(np.float32)
    values, scales = quantize_matrices(jnp.asarray(w))
    for group, one in enumerate(w):
        exact = fp8_oracle.quantize(one, SQUARE, False)
        assert same_bits(np.asarray(values[group]), exact[0])
        assert same_bits(np.asarray(scales[group]), exact[1])


def test_sizes_are_data_not_shapes(seed):
    x, w, sizes, dy = drawn(seed, "skewed, empty, odd, rows behind")
    traces = []

    @jax.jit
    def layer(sizes):
        traces.append(sizes)
        return fp8_grouped_linear(jnp.asarray(x), jnp.asarray(w), sizes)

    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 0, 1, 4, 2]):
        expected, _, _ = model(x, w, sizes[order], dy)
        assert rel_err(layer(jnp.asarray(sizes[order])), expected) < TOLERANCE["f32"]
    assert len(traces) == 1


def test_a_wrong_answer_is_seen(seed):
    x, w, sizes, dy = drawn(seed, "skewed, empty, odd, rows behind")
    moved = sizes - np.int32([0, 0, 0, 1, 0, -1])
    found = value_and_gradients(x, w, moved, dy)
    for one, exact in zip(found, model(x, w, sizes, dy), strict=True):
        assert not rel_err(one, exact) < TOLERANCE["f32"]


@pytest.mark.usefixtures("uncached")
def test_experts_and_tokens_on_several_devices(seed):
    """Two devices by two: each pair has its experts, each of a pair its rows of them."""
    rng = np.random.default_rng(seed)
    sizes = np.array([[[30, 9], [0, 40]], [[1, 1], [20, 0]]], np.int32)  # expert, data, group
    x = rng.standard_normal((2, 2, 40, 24)).astype(np.float32)
    dy = rng.standard_normal((2, 2, 40, 16)).astype(np.float32)
    w = rng.standard_normal((2, 2, 16, 24)).astype(np.float32)

    def layer(x, w, sizes, dy):
        def inner(x, w):
            return fp8_grouped_linear(x, w, sizes[0, 0])

        # As a layer of the model has it: in a loop, and done again on the way back.
        def looped(x, w):
            one = jax.checkpoint(inner)
            y, _ = jax.lax.scan(lambda y, w: (y + one(x, w), None), jnp.zeros_like(dy[0, 0]), w)
            return y

        y, back = jax.vjp(looped, x[0, 0], w)
        dx, dw = back(dy[0, 0])
        return y[None, None], dx[None, None], dw

    mesh = jax.make_mesh((2, 2), ("expert", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    both = P("expert", "data")
    sharded = jax.shard_map(
        layer,
        mesh=mesh,
        in_specs=(both, P("expert"), both, both),
        out_specs=(both, both, P("expert")),
    )
    y, dx, dw = jax.jit(sharded)(*map(jnp.asarray, (x, w, sizes, dy)))
    sums = np.zeros(w.shape)
    for expert in range(2):
        for data in range(2):
            here = expert, data
            exact = model(x[here], w[expert][None][0], sizes[here], dy[here])
            assert rel_err(y[here], exact[0]) < TOLERANCE["f32"]
            assert rel_err(dx[here], exact[1]) < TOLERANCE["f32"]
            sums[expert] += exact[2]
    assert rel_err(dw, sums) < TOLERANCE["f32"]


def test_bad_input_is_refused():
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 5, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"sizes \[G\]; got \(4, 3\), \(2, 3, 5\), \(2,\)"):
        fp8_grouped_linear(x, jnp.zeros((2, 3, 5)), sizes)
    with pytest.raises(ValueError, match=r"sizes \[G\]; got .*\(3,\)"):
        fp8_grouped_linear(x, w, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="weight_grad 'bf16'; there are 'fp8' and 'exact'"):
        fp8_grouped_linear(x, w, sizes, weight_grad="bf16")
    with pytest.raises(ValueError, match="implementation 'blocks'; there are"):
        jax.eval_shape(lambda x: fp8_grouped_linear(x, w, sizes, implementation="blocks"), x)
