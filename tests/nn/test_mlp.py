"""SwiGLU against NumPy float64: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.nn.mlp import SwiGlu
from tests.tolerance import TOLERANCE, rel_err

D, F = 5, 7


def plain(x: np.ndarray, gate_DF: np.ndarray, up_DF: np.ndarray, down_FD: np.ndarray):
    gate = x @ gate_DF
    return (gate / (1 + np.exp(-gate)) * (x @ up_DF)) @ down_FD


def test_values_and_gradients(seed):
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal(s) for s in ((2, 3, D), (D, F), (D, F), (F, D))]
    along, moves = rng.standard_normal((2, 3, D)), [rng.standard_normal(p.shape) for p in parts]
    with jax.enable_x64(True):
        mlp = SwiGlu(D, F, std=1.0, rngs=nnx.Rngs(0))
        mlp.gate_up_proj[...] = jnp.stack([jnp.asarray(parts[1]), jnp.asarray(parts[2])], axis=1)
        mlp.down_proj[...] = jnp.asarray(parts[3])
        x_BTD = jnp.asarray(parts[0])
        assert rel_err(mlp(x_BTD), plain(*parts)) < TOLERANCE["f64"]
        of_x, of_mlp = jax.grad(lambda x, mlp: (mlp(x) * along).sum(), argnums=(0, 1))(x_BTD, mlp)
    pair = np.asarray(of_mlp.gate_up_proj[...])
    gradients = [of_x, pair[:, 0], pair[:, 1], np.asarray(of_mlp.down_proj[...])]

    def value(step: float) -> float:
        moved = [part + step * move for part, move in zip(parts, moves, strict=True)]
        return float((plain(*moved) * along).sum())

    slope = sum(float((np.asarray(g) * m).sum()) for g, m in zip(gradients, moves, strict=True))
    assert slope == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-7)
