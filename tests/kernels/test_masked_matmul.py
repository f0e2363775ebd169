"""The product of groups with places, and both gradients, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import select
from pallas_kernels.chip import interpreted
from pallas_kernels.masked_matmul import IMPLEMENTATIONS, masked_matmul
from pallas_kernels.tiles import places
from tests.kernels.backends import run
from tests.tolerance import TOLERANCE, rel_err

# Name -> (places, sizes, K, N): K and N by 64, as the kernel wants them.
SHAPES = {
    "few places": (12, [12, 0, 5], 128, 192),
    "more than a tile": (136, [136, 3], 64, 64),
}
WIDE = (3, [1, 3], 64, 256)


def with_gradients(x, w, sizes, grad, implementation):
    y, back = jax.vjp(lambda x, w: masked_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *back(grad)


def drawn(places, sizes, K, N, seed, dtype):
    """Operands with NaN in places that are not used; what should come out, and no NaN with it."""
    rng, groups = np.random.default_rng(seed), len(sizes)
    scale = 10.0 ** np.arange(groups)[:, None, None]  # groups differ tenfold
    shapes = (groups, places, K), (groups, K, N), (groups, places, N)
    x, w, grad = (jnp.asarray(scale * rng.standard_normal(shape), dtype) for shape in shapes)
    unused = np.arange(places)[None] >= np.array(sizes)[:, None]
    x, grad = (jnp.where(unused[..., None], jnp.nan, one) for one in (x, grad))
    wide_x, wide_w, wide_grad = (np.asarray(one, np.float64) for one in (x, w, grad))
    expected = y, dx, dw = [np.zeros(shape) for shape in (shapes[2], shapes[0], shapes[1])]
    for g, size in enumerate(sizes):
        y[g, :size] = wide_x[g, :size] @ wide_w[g]
        dx[g, :size] = wide_grad[g, :size] @ wide_w[g].T
        dw[g] = wide_x[g, :size].T @ wide_grad[g, :size]
    return (x, w, jnp.asarray(sizes, jnp.int32), grad), expected


def assert_close(found, expected, dtype, bound):
    for one, exact, what in zip(found, expected, ["y", "grad x", "grad w"], strict=True):
        assert one.dtype == dtype
        for group, (ours, theirs) in enumerate(zip(one, exact, strict=True)):
            assert rel_err(ours, theirs) < bound, (what, group)


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        ("batched", jnp.float32, TOLERANCE["f32"]),
        ("batched", jnp.bfloat16, TOLERANCE["bf16"] / 2),
        ("gpu", jnp.bfloat16, TOLERANCE["bf16"] / 2),
        (None, jnp.bfloat16, TOLERANCE["bf16"] / 2),
    ],
)
@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), pytest.param(WIDE, marks=pytest.mark.thorough)]
)
def test_values_and_gradients(shape, name, dtype, bound, seed):
    operands, expected = drawn(*shape, seed, dtype)
    assert_close(run(name, with_gradients, *operands), expected, dtype, bound)


def test_float64_is_kept(seed):
    with jax.enable_x64(True):
        operands, expected = drawn(*SHAPES["few places"], seed, jnp.float64)
        found = run("batched", with_gradients, *operands)
    assert_close(found, expected, np.float64, TOLERANCE["f64"])


def test_programs_share_the_tiles(seed):
    (x, w, sizes, _), (exact, _, _) = drawn(*SHAPES["few places"], seed, jnp.bfloat16)  # six tiles
    with interpreted("gpu", programs=4):
        call = jax.jit(lambda *a: masked_matmul(*a, implementation="gpu"))
        found = np.asarray(call(x, w, sizes))
    for one, other in zip(found, exact, strict=True):
        assert rel_err(one, other) < TOLERANCE["bf16"] / 2


def test_tiles_without_a_row_are_skipped():
    layout = places(jnp.array([0, 1, 128, 129], jnp.int32), 200)
    assert layout.group_T.tolist() == [-1, -1, 1, -1, 2, -1, 3, 3]


def test_a_wrong_size_is_seen(seed):
    (x, w, sizes, grad), expected = drawn(*SHAPES["few places"], seed, jnp.float32)
    for one, exact in zip(run(None, with_gradients, x, w, sizes - 1, grad), expected, strict=True):
        assert not rel_err(one, exact) < 0.01


@pytest.mark.parametrize("name", ["batched", None])
def test_no_places(name):
    x, w = jnp.zeros((2, 0, 3)), jnp.ones((2, 3, 5))
    assert masked_matmul(x, w, jnp.zeros(2, jnp.int32), implementation=name).shape == (2, 0, 5)


def test_the_gpu_kernel_says_what_it_does_not_do():
    x, w, sizes = jnp.zeros((2, 4, 64)), jnp.zeros((2, 64, 128)), jnp.zeros(2, jnp.int32)

    def refused(why, x, w):
        with pytest.raises(select.Unsupported, match=f"^masked_matmul/gpu wants {why}"):
            masked_matmul(x, w, sizes, implementation="gpu")

    refused("an NVIDIA Hopper GPU, here is 'cpu'", x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    with interpreted("gpu"):
        refused("operands of bfloat16, got float32 and float32", x, w)
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        refused(r".* by 64; got \(2, 4, 32\) and \(2, 32, 128\)", x[..., :32], w[:, :32])
        refused(r".* by 64; got \(2, 4, 64\) and \(2, 64, 72\)", x, w[..., :72])
        refused(r"at least one number.* got \(2, 0, 64\)", x[:, :0], w)


def test_the_default_is_one_product_of_all():
    assert next(iter(IMPLEMENTATIONS)) == "batched"
    with interpreted("gpu"):
        x, w = jnp.zeros((2, 4, 64), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
        program = str(jax.make_jaxpr(lambda *a: masked_matmul(*a))(x, w, jnp.zeros(2, jnp.int32)))
    assert "wgmma" not in program


def test_bad_input_is_refused(seed):
    (x, w, sizes, _), _ = drawn(*SHAPES["few places"], seed, jnp.float32)
    with pytest.raises(ValueError, match=r"masked_matmul wants .* and sizes \[G\]; got .*\(2,\)$"):
        masked_matmul(x, w, sizes[:2])
    with pytest.raises(ValueError, match=r"wants x \[G, M, K\], w \[G, K, N\] .*\(3, 64, 192\)"):
        masked_matmul(x, w[:, :64], sizes)
    with pytest.raises(ValueError, match=r"wants w of float32 with 3 dimensions, got bfloat16\(3,"):
        masked_matmul(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match=r"wants sizes of int32 or int64 .* got float32\(3,\)"):
        masked_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"'blocks'; there are \['batched', 'gpu'\]"):
        masked_matmul(x, w, sizes, implementation="blocks")
