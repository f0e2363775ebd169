"""RMSNorm against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.nn.norm import RMSNorm
from tests.tolerance import TOLERANCE, rel_err


def norm_of(scale_D: np.ndarray, eps: float) -> RMSNorm:
    norm = RMSNorm(len(scale_D), eps=eps)
    norm.scale = norm.scale.replace(jnp.asarray(scale_D))
    return norm


def plain(x: np.ndarray, scale_D: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale_D


@pytest.mark.parametrize(("dtype", "bound"), [("float64", "f64"), ("float32", "f32")])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_values(shape, dtype, bound, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        x, scale_D = (jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, (5,)))
        found = norm_of(scale_D, 0.1)(x)
    assert found.dtype == dtype
    expected = plain(np.asarray(x, np.float64), np.asarray(scale_D, np.float64), 0.1)
    assert rel_err(found, expected) < TOLERANCE[bound]


def test_bfloat16_is_rounded_once(seed):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((4, 256)), jnp.bfloat16)
    found = norm_of(np.full(256, 3.0, np.float32), 1e-6)(x)
    assert found.dtype == jnp.bfloat16
    expected = plain(np.asarray(x, np.float64), np.full(256, 3.0), 1e-6)
    assert rel_err(found, expected) < TOLERANCE["bf16"] / 2


def test_zeros_stay_zeros_and_have_a_gradient():
    norm = RMSNorm(3, eps=1e-6)
    value, gradient = jax.value_and_grad(lambda x: norm(x).sum())(jnp.zeros(3))
    assert value == 0
    np.testing.assert_allclose(gradient, np.full(3, 1e3), rtol=1e-6)
