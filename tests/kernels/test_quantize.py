"""Every quantizer on every backend against NumPy float64, to the bit; and against the converter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.hf import fp8
from pallas_kernels import quantize, select
from tests.kernels import fp8_oracle
from tests.kernels.backends import BACKENDS, on, run, same_bits
from tests.tolerance import TOLERANCE, rel_err

ROW, SQUARE = (1, 128), (128, 128)


def mixed(seed: int, dtype, shape=(192, 320)) -> np.ndarray:
    """A patchwork: wide and narrow numbers, ties, zeros of both signs, denormals, one number."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))
    # Whole numbers below a largest of 36: 27 / (36 / 448) is 336 but for the rounding of the scale,
    # and 336 is a tie that a quotient in float32 takes for one.
    x[:40] = rng.integers(-36, 37, (40, shape[1]))
    x[:40, ::128] = 36
    x[40:48] = 0
    x[44:46] = -0.0
    x[48:52] = 1e-40 * rng.standard_normal((4, shape[1]))
    x[52:56] = 3e-7 * rng.standard_normal((4, shape[1]))
    x[56:60] = -7.3
    x[100:104] *= 1e30
    x[128:] = rng.standard_normal(x[128:].shape) * 2.0 ** rng.integers(-12, 0)
    return np.asarray(x.astype(np.float32), dtype)


def expected(function, x: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, ...]:
    if function is quantize.quantize_blocks:
        return fp8_oracle.quantize(x, SQUARE, power_of_two)
    rows = fp8_oracle.quantize(x, ROW, power_of_two)
    columns = fp8_oracle.quantize(x.T, ROW, power_of_two)
    return {
        quantize.quantize_rows: rows,
        quantize.quantize_columns: columns,
        quantize.quantize_rows_and_columns: (*rows, *columns),
    }[function]


FUNCTIONS = [
    quantize.quantize_rows,
    quantize.quantize_columns,
    quantize.quantize_rows_and_columns,
    quantize.quantize_blocks,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_bits_are_those_of_the_exact_quotients(function, dtype, backend, seed):
    x = mixed(seed, dtype)
    power_of_two = dtype == jnp.float32  # both kinds of scale, in half as many runs
    found = run(backend, function, jnp.asarray(x), power_of_two=power_of_two)
    for one, exact in zip(found, expected(function, x, power_of_two), strict=True):
        assert same_bits(one, exact)


@pytest.mark.parametrize("function", FUNCTIONS[2:], ids=lambda function: function.__name__)
@pytest.mark.parametrize("shape", [(1, 1), (37, 200), (128, 128), (130, 257)], ids=str)
def test_edges_are_cut_short(shape, function, seed):
    x = np.random.default_rng(seed).standard_normal(shape).astype(jnp.bfloat16)
    found = run("reference", function, jnp.asarray(x))
    for one, exact in zip(found, expected(function, x, False), strict=True):
        assert same_bits(one, exact)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (quantize.quantize_rows, (3, 128)),  # a few tokens
        (quantize.quantize_rows_and_columns, (37, 200)),
        (quantize.quantize_blocks, (130, 70)),
    ],
    ids=lambda one: str(one) if isinstance(one, tuple) else one.__name__,
)
def test_kernels_cut_any_edge(function, shape, backend, seed):
    x = np.random.default_rng(seed).standard_normal(shape).astype(jnp.bfloat16)
    found = run(backend, function, jnp.asarray(x))
    for one, exact in zip(found, expected(function, x, False), strict=True):
        assert same_bits(one, exact)


@pytest.mark.parametrize("function", FUNCTIONS[2:], ids=lambda function: function.__name__)
@pytest.mark.parametrize("shape", [(0, 256), (16, 0)], ids=str)
def test_nothing_gives_nothing(function, shape):
    x = jnp.zeros(shape, jnp.bfloat16)
    found = run("reference", function, x)
    for one, exact in zip(found, expected(function, np.asarray(x), False), strict=True):
        assert same_bits(one, exact)


def test_a_gpus_copy_engine_is_given_what_it_takes():
    """Rows by 8, or 64 that become columns, and columns by 64; the interpreter would take any."""
    x = jax.ShapeDtypeStruct((3, 100), jnp.bfloat16)
    with on("gpu"):
        for function, given in zip(FUNCTIONS, ["8,128", "64,128", "64,128", "8,128"], strict=True):
            call = functools.partial(function, implementation="gpu")
            assert f"bf16[{given}]" in str(jax.make_jaxpr(call)(x))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_spoils_its_block_and_no_other(backend, power_of_two, seed):
    x = mixed(seed, jnp.float32, (64, 384))
    clean = run(backend, quantize.quantize_rows, jnp.asarray(x), power_of_two=power_of_two)
    x[3, 5], x[7, 200], x[9, 383], x[9, 0] = np.nan, np.inf, -np.inf, -np.nan
    values, scales = run(backend, quantize.quantize_rows, jnp.asarray(x), power_of_two=power_of_two)
    spoilt = np.zeros(scales.shape, bool)
    spoilt[[3, 7, 9, 9], [0, 1, 2, 0]] = True
    assert (np.isnan(scales) == spoilt).all()
    assert np.isnan(values.astype(np.float32))[spoilt.repeat(128, 1)].all()
    assert (values == clean[0])[~spoilt.repeat(128, 1)].all()
    assert (scales == clean[1])[~spoilt].all()


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(128, 256), (200, 300)], ids=str)
def test_the_converter_gives_the_same(shape, ue8m0, seed):
    weight = mixed(seed, jnp.bfloat16, shape)
    found = run("reference", quantize.quantize_blocks, jnp.asarray(weight), power_of_two=ue8m0)
    for one, other in zip(found, fp8.quantize(weight, ue8m0=ue8m0), strict=True):
        assert same_bits(one, other)


def test_scales_at_powers_of_two():
    """448 * 2**k is the largest number whose power of two is 2**k; the next float is beyond it."""
    amax = np.float32([448, 224, 7, 3.5 * 2**-10])
    x = np.stack([amax, np.nextafter(amax, np.float32(np.inf))], 1).reshape(-1, 1)
    _, scales = run("reference", quantize.quantize_rows, jnp.asarray(x), power_of_two=True)
    exponents = np.log2(scales[:, 0]).reshape(-1, 2)
    assert exponents.tolist() == [[0, 1], [-1, 0], [-6, -5], [-17, -16]]


def test_every_scale_and_value_of_bfloat16():
    """All magnitudes a block can have, in blocks of their own beside 127 fractions of them."""
    amax = np.arange(0x7F80, dtype=np.uint16)[::7].view(jnp.bfloat16).astype(np.float32)
    x = amax[:, None] * (np.arange(128, dtype=np.float32) / 127)
    for power_of_two in (False, True):
        found = run("reference", quantize.quantize_rows, jnp.asarray(x), power_of_two=power_of_two)
        for one, exact in zip(found, fp8_oracle.quantize(x, ROW, power_of_two), strict=True):
            assert same_bits(one, exact)


def test_rounding_leans_to_neither_side(seed):
    # Even in every step of e4m3, as normal numbers are not: with 1 the largest in each block.
    x = np.random.default_rng(seed).uniform(-1, 1, (256, 384)).astype(np.float32)
    x[:, ::128] = 1
    quantized = run("reference", quantize.quantize_rows, jnp.asarray(x))
    error = fp8_oracle.dequantize(*quantized, ROW) - x
    above = np.sum(error * np.sign(x) > 0)
    # Of n fair coins, heads differ from n/2 by more than 4 deviations of sqrt(n)/2 in 6 of 100,000.
    n = np.sum(error != 0)
    assert n > 0.9 * x.size
    assert abs(above - n / 2) < 4 * np.sqrt(n) / 2


@pytest.mark.parametrize(
    ("back", "block"), [(quantize.dequantize_rows, ROW), (quantize.dequantize_blocks, SQUARE)]
)
def test_dequantizing_is_one_product(back, block, seed):
    values, scales = fp8_oracle.quantize(mixed(seed, jnp.bfloat16, (150, 300)), block, False)
    exact = fp8_oracle.dequantize(values, scales, block)
    values, scales = jnp.asarray(values), jnp.asarray(scales)
    assert (np.asarray(jax.jit(back)(values, scales)) == exact.astype(np.float32)).all()
    short = jax.jit(back, static_argnums=2)(values, scales, jnp.bfloat16)
    assert short.dtype == jnp.bfloat16
    assert rel_err(short, exact) < TOLERANCE["bf16"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu(backend, seed):
    rng = np.random.default_rng(seed)
    gate_up = (3 * rng.standard_normal((72, 384))).astype(jnp.bfloat16)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    product = gate / (1 + np.exp(-gate)) * up
    exact_values, exact_scales = fp8_oracle.quantize(product, ROW, False)
    values, scales = run(backend, quantize.swiglu_quantize, jnp.asarray(gate_up))
    # A few roundings of float32 (eps 6e-8) in exp, the quotient and the products.
    assert np.abs(scales / exact_scales - 1).max() < 1e-6
    steps = np.abs(values.view(np.int8).astype(int) - exact_values.view(np.int8).astype(int))
    assert steps.max() <= 1
    assert np.mean(steps) < 1e-3


def test_swiglu_of_anything_else_is_seen(seed):
    gate_up = np.random.default_rng(seed).standard_normal((8, 256)).astype(np.float32)
    swapped = np.concatenate(np.split(gate_up, 2, axis=1)[::-1], axis=1)
    one, other = (
        run("reference", quantize.swiglu_quantize, jnp.asarray(x))[0] for x in (gate_up, swapped)
    )
    assert np.mean(one != other) > 0.5


def test_the_default_goes_on_where_a_backend_does_not_fit(seed):
    x = jnp.zeros((0, 200), jnp.bfloat16)
    with on("gpu"):
        for function in FUNCTIONS:
            with pytest.raises(select.Unsupported, match=r"wants numbers, got \(0, 200\); name an"):
                function(x, implementation="gpu")
        found = jax.jit(quantize.quantize_rows)(x)
    exact = expected(quantize.quantize_rows, np.asarray(x), False)
    assert all(same_bits(np.asarray(one), other) for one, other in zip(found, exact, strict=True))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"quantize_rows wants x of bfloat16 or .* int32\(4, 4\)"):
        quantize.quantize_rows(jnp.zeros((4, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"quantize_blocks wants x of .* 2 dimensions, .*\(4,\)"):
        quantize.quantize_blocks(jnp.zeros(4, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"dequantizing wants scales of float32 .*float16\(4, 2\)"):
        values = jnp.zeros((4, 200), jnp.float8_e4m3fn)
        quantize.dequantize_rows(values, jnp.zeros((4, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"gate and up side by side, got \(2, 3\)"):
        quantize.swiglu_quantize(jnp.zeros((2, 3), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"values \(4, 200\) have scales \(4, 2\), got \(4, 1\)"):
        quantize.dequantize_rows(jnp.zeros((4, 200), jnp.float8_e4m3fn), jnp.zeros((4, 1)))


# The GPU interpreter takes one device's barriers for leftovers of another's.
@pytest.mark.parametrize(("backend", "devices"), [("gpu", 1), ("tpu", 2)])
@pytest.mark.usefixtures("uncached")
def test_kernels_run_per_device(backend, devices, seed):
    x = mixed(seed, jnp.float32, (128, 128))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.P("data")

    def rows(x):
        return quantize.quantize_rows(x, implementation=backend)

    with on(backend), jax.set_mesh(mesh):
        sharded = jax.shard_map(rows, in_specs=spec, out_specs=(spec, spec))
        found = jax.tree.map(np.asarray, jax.jit(sharded)(jax.device_put(x, spec)))
    for one, exact in zip(found, expected(quantize.quantize_rows, x, False), strict=True):
        assert same_bits(one, exact)
