"""The FP8 product on every backend, and the linear layer above it, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import select
from pallas_kernels.chip import interpreted
from pallas_kernels.fp8_linear import fp8_linear
from pallas_kernels.fp8_matmul import fp8_matmul
from tests.kernels import fp8_oracle
from tests.kernels.backends import PRODUCTS, on, run, tolerance
from tests.tolerance import TOLERANCE, rel_err

ROW, SQUARE = (1, 128), (128, 128)
# (M, N, K): whole tiles; edges of all three, more tiles than one; more steps than the GPU's stages
# and a ragged last one; few rows.
SHAPES = [(128, 128, 256), (200, 192, 192), (64, 64, 832), (3, 64, 128)]


def drawn(seed: int, shape: tuple[int, int, int], by_column: bool):
    """FP8 operands of wide range, and the exact product of what they stand for."""
    rng = np.random.default_rng(seed)
    M, N, K = shape
    operands, exact = [], []
    for rows, block in ((M, ROW), (N, ROW if by_column else SQUARE)):
        numbers = rng.standard_normal((rows, K)) * np.exp(rng.standard_normal((rows, K)))
        # Blocks differ in scale a thousandfold, so that a scale in the wrong place is seen.
        numbers *= 10.0 ** rng.uniform(-1.5, 1.5, (rows, -(-K // 128))).repeat(128, 1)[:, :K]
        quantized = fp8_oracle.quantize(numbers, block, power_of_two=False)
        operands += map(jnp.asarray, quantized)
        exact.append(fp8_oracle.dequantize(*quantized, block))
    return operands, exact[0] @ exact[1].T


@pytest.mark.parametrize("backend", PRODUCTS)
@pytest.mark.parametrize(
    ("shape", "by_column"),
    [*((shape, False) for shape in SHAPES), (SHAPES[1], True), (SHAPES[2], True)],
    ids=lambda one: str(one) if isinstance(one, tuple) else ["blocks", "columns"][one],
)
def test_product(shape, by_column, backend, seed):
    operands, exact = drawn(seed, shape, by_column)
    dtype = jnp.float32 if by_column else jnp.bfloat16
    found = run(backend, fp8_matmul, *operands, out_dtype=dtype)
    assert found.dtype == dtype
    assert rel_err(found, exact) < tolerance(backend, dtype)


@pytest.mark.parametrize("backend", ["dequantize", "reference", "tpu"])
@pytest.mark.parametrize("shape", [(37, 70, 200), (1, 1, 1)], ids=str)
def test_any_size(shape, backend, seed):
    operands, exact = drawn(seed, shape, False)
    found = run(backend, fp8_matmul, *operands, out_dtype=jnp.float32)
    assert rel_err(found, exact) < TOLERANCE["f32"]


def test_factors_of_bf16_lose_nothing_to_powers_of_two(seed):
    """Where scales have no bits of their own, the factors have no more than e4m3's four."""
    (x, x_scales, w, w_scales), _ = drawn(seed, (70, 64, 300), False)
    x_scales, w_scales = (2.0 ** jnp.round(jnp.log2(one)) for one in (x_scales, w_scales))
    found, exact = (
        run(name, fp8_matmul, x, x_scales, w, w_scales, out_dtype=jnp.float32)
        for name in ("dequantize_bf16", "reference")
    )
    assert rel_err(found, exact) < TOLERANCE["f32"]


def test_programs_share_the_tiles(seed):
    operands, exact = drawn(seed, (200, 192, 192), False)  # four tiles
    with interpreted("gpu", programs=3):
        found = np.asarray(jax.jit(lambda *a: run_named("gpu", *a))(*operands))
    assert rel_err(found, exact) < TOLERANCE["bf16"]


@pytest.mark.parametrize("shape", [(0, 64, 128), (8, 0, 128), (8, 64, 0)], ids=str)
def test_nothing_gives_zeros(shape):
    M, N, K = shape
    x, w = jnp.zeros((M, K), jnp.float8_e4m3fn), jnp.zeros((N, K), jnp.float8_e4m3fn)
    across = -(-K // 128)
    y = fp8_matmul(x, jnp.zeros((M, across)), w, jnp.zeros((-(-N // 128), across)))
    assert y.shape == (M, N)
    assert not np.asarray(y, np.float32).any()


@pytest.mark.parametrize("backend", ["dequantize", "gpu"])
def test_nan_stays_in_its_rows(backend, seed):
    operands, _ = drawn(seed, (64, 64, 256), False)
    clean = run(backend, fp8_matmul, *operands)
    operands[1] = operands[1].at[5, 1].set(jnp.nan)
    found = run(backend, fp8_matmul, *operands)
    assert np.isnan(found[5].astype(np.float32)).all()
    assert (np.delete(found, 5, 0) == np.delete(clean, 5, 0)).all()


@pytest.mark.parametrize("wrong", ["x scales turned", "w scales turned", "one scale for all"])
def test_a_wrong_answer_is_seen(wrong, seed):
    (x, x_scales, w, w_scales), exact = drawn(seed, (128, 256, 256), False)
    if wrong == "x scales turned":
        x_scales = x_scales[:, ::-1]
    elif wrong == "w scales turned":
        w_scales = w_scales.T
    else:
        w_scales = jnp.full_like(w_scales, w_scales.mean())
    assert not rel_err(fp8_matmul(x, x_scales, w, w_scales), exact) < 0.1


def test_the_default_goes_on_where_a_backend_does_not_fit(seed):
    operands, exact = drawn(seed, (8, 70, 128), False)
    with on("gpu"):
        with pytest.raises(
            select.Unsupported, match=r"wants K by 64 and N by 64 .* \(8, 128\), N=70"
        ):
            fp8_matmul(*operands, implementation="gpu")
        assert rel_err(fp8_matmul(*operands, out_dtype=jnp.float32), exact) < TOLERANCE["f32"]


def test_a_cpu_takes_one_product(seed):
    operands, _ = drawn(seed, (8, 64, 512), False)
    assert "scan" in str(jax.make_jaxpr(lambda *a: run_named("reference", *a))(*operands))
    assert "scan" not in str(jax.make_jaxpr(lambda *a: run_named(None, *a))(*operands))


WIDE = [(64, 192, 512), (3, 64, 700)]


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_blocks_lose_nothing_between_near_powers_of_two(shape, seed):
    rng = np.random.default_rng(seed)
    M, N, K = shape
    operands, exact = [], []
    for rows, block in ((M, ROW), (N, SQUARE)):
        # Whole numbers up to 15 have 4 bits, and three steps down from 2**5 still 15 * 2**-9.
        numbers = rng.integers(-15, 16, (rows, K)) * 1.0
        numbers[:, ::128] = 15
        scales = 2.0 ** rng.integers(0, 4, (-(-rows // block[0]), -(-K // 128)))
        values, _ = fp8_oracle.quantize(numbers, block, power_of_two=True)
        operands += [jnp.asarray(values), jnp.asarray(scales, jnp.float32)]
        exact.append(fp8_oracle.dequantize(values, scales, block))
    found = run("tpu", wide, *operands)
    assert rel_err(found, exact[0] @ exact[1].T) < TOLERANCE["f32"]


@pytest.mark.parametrize("by_column", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_wide_blocks_are_rounded_twice(by_column, seed):
    operands, exact = drawn(seed, (64, 64, 1024), by_column)
    found = run("tpu", wide, *operands)
    # As far off as two operands of e4m3 may be (`test_near_the_unquantized_one` of the experts'
    # layer), and by no means equal.
    assert 2.0**-8 < rel_err(found, exact) < 2**0.5 * 2.0**-4 / 3**0.5


def wide(*operands, implementation):
    return fp8_matmul(*operands, implementation=f"{implementation}_wide", out_dtype=jnp.float32)


def test_wide_blocks_run_where_they_are_named(seed):
    operands, _ = drawn(seed, (8, 64, 512), False)
    with pytest.raises(select.Unsupported, match=r"^fp8_matmul/tpu_wide wants a TPU v7x, .* 'cpu'"):
        fp8_matmul(*operands, implementation="tpu_wide")
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(select.Unsupported, match=r"wants a TPU v7x, .* here is 'TPU v6 lite'"),
    ):
        jax.eval_shape(lambda *a: run_named("tpu_wide", *a), *operands)
    with on("tpu"):
        assert "fp8_matmul_wide" not in str(jax.make_jaxpr(fp8_matmul)(*operands))


def run_named(implementation, *operands):
    return fp8_matmul(*operands, implementation=implementation)


def test_bad_input_is_refused():
    x, w = jnp.zeros((8, 256), jnp.float8_e4m3fn), jnp.zeros((64, 256), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"got \(8, 256\), \(8, 1\), \(64, 256\), \(1, 2\)"):
        fp8_matmul(x, jnp.zeros((8, 1)), w, jnp.zeros((1, 2)))
    with pytest.raises(
        ValueError, match=r"wants x of float8_e4m3fn with 2 .* float32\(8, 256\); c"
    ):
        fp8_matmul(jnp.zeros((8, 256)), jnp.zeros((8, 2)), w, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"wants x of .* with 2 dimensions, got .*\(1, 8, 256\)"):
        fp8_matmul(x[None], jnp.zeros((8, 2)), w, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"wants w_scales of float32 .* got bfloat16\(1, 2\)"):
        fp8_matmul(x, jnp.zeros((8, 2)), w, jnp.zeros((1, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"out_dtype of bfloat16 or float32, got int8; cast"):
        fp8_matmul(x, jnp.zeros((8, 2)), w, jnp.zeros((1, 2)), out_dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"fp8_linear wants x of bfloat16 or float32 .* float16"):
        fp8_linear(jnp.zeros((8, 256), jnp.float16), jnp.zeros((64, 256)))
    with pytest.raises(ValueError, match="weight_grad 'bf16'; there are 'fp8' and 'exact'"):
        fp8_linear(jnp.zeros((8, 256)), jnp.zeros((64, 256)), weight_grad="bf16")
    with pytest.raises(ValueError, match=r"wants x \[M, K\], w \[N, K\]; got \(8, 3\), \(3, 8\)"):
        fp8_linear(jnp.zeros((8, 3)), jnp.zeros((3, 8)))


def rounded(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    return fp8_oracle.dequantize(*fp8_oracle.quantize(x, block, power_of_two=False), block)


def linear(seed: int, shape: tuple[int, int, int]):
    rng = np.random.default_rng(seed)
    M, N, K = shape
    sizes = (M, K), (N, K), (M, N)
    return [(rng.standard_normal(s) * np.exp(rng.standard_normal(s))).astype("f4") for s in sizes]


def value_and_gradients(x, w, dy, **options):
    def both(x, w, dy, **options):
        y, back = jax.vjp(lambda x, w: fp8_linear(x, w, **options), x, w)
        return y, *back(dy)

    backend = options.pop("implementation", None)
    return run(backend, both, *map(jnp.asarray, (x, w, dy)), **options)


@pytest.mark.parametrize("backend", ["dequantize", "reference", "gpu", "tpu"])
def test_linear_is_three_fp8_products(backend, seed):
    x, w, dy = linear(seed, (64, 64, 64))
    found = value_and_gradients(x, w, dy, implementation=backend)
    exact = (
        rounded(x, ROW) @ rounded(w, SQUARE).T,
        rounded(dy, ROW) @ rounded(w, SQUARE),
        rounded(dy.T, ROW) @ rounded(x.T, ROW).T,
    )
    for one, other, what in zip(found, exact, ["y", "dx", "dw"], strict=True):
        assert rel_err(one, other) < TOLERANCE["f32"], what


def test_few_tokens_go_through_the_gpus_kernels(seed):
    x, w, _ = linear(seed, (3, 64, 128))
    y = run("gpu", fp8_linear, jnp.asarray(x), jnp.asarray(w))
    assert rel_err(y, rounded(x, ROW) @ rounded(w, SQUARE).T) < TOLERANCE["f32"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_no_platform_rounds_what_exact_gradients_come_from(dtype, seed):
    x, w, _ = (jnp.asarray(one, dtype) for one in linear(seed, (8, 64, 128)))

    def of(weight_grad):
        def loss(w):
            return fp8_linear(x, w, weight_grad=weight_grad, implementation="reference").sum()

        return str(jax.make_jaxpr(jax.grad(loss))(w)).count("Precision.HIGHEST")

    assert of("fp8") == 0
    assert of("exact") == (2 if dtype == jnp.float32 else 0)


def test_exact_weight_gradient(seed):
    x, w, dy = linear(seed, (40, 70, 150))
    _, dx, dw = value_and_gradients(x, w, dy, weight_grad="exact")
    assert rel_err(dx, rounded(dy, ROW) @ rounded(w, SQUARE)) < TOLERANCE["f32"]
    assert rel_err(dw, dy.astype(np.float64).T @ x.astype(np.float64)) < TOLERANCE["f32"]


def test_linear_is_near_the_unquantized_one(seed):
    x, w, dy = linear(seed, (130, 70, 300))
    found = value_and_gradients(x, w, dy)
    # e4m3 keeps 4 bits: a number is off by 2**-4 of itself at most and a quarter of that in the
    # mean square, products of two such by sqrt(2) times as much; signs are random, so sums are too.
    for one, exact in zip(found, (x @ w.T, dy @ w, dy.T @ x), strict=True):
        assert 2.0**-7 < rel_err(one, exact) < 1.5 * 2**0.5 * 2.0**-6


def test_linear_keeps_dtypes(seed):
    x, w, dy = linear(seed, (8, 16, 32))
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    y, dx, dw = value_and_gradients(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.usefixtures("uncached")
def test_tokens_on_two_devices_give_the_same(seed):
    x, w, dy = map(jnp.asarray, linear(seed, (256, 64, 128)))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def both(x, w, dy):
        y, back = jax.vjp(fp8_linear, x, w)
        dx, dw = back(dy)
        return y, dx, dw

    spec = P("data")
    sharded = jax.shard_map(
        both, mesh=mesh, in_specs=(spec, P(), spec), out_specs=(spec, spec, P())
    )
    one, other = jax.jit(sharded)(x, w, dy), jax.jit(both)(x, w, dy)
    assert (np.asarray(one[0]) == np.asarray(other[0])).all()
    assert (np.asarray(one[1]) == np.asarray(other[1])).all()
    assert rel_err(one[2], other[2]) < TOLERANCE["f32"]
