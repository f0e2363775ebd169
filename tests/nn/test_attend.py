"""Attention in blocks of queries against the plain formula in NumPy, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import sharding
from dsjax.nn import attend as attend_file
from dsjax.nn import masks
from dsjax.nn.attend import attend
from dsjax.nn.masks import Places
from tests.tolerance import TOLERANCE, rel_err

B, T, N, H, R, W = 2, 12, 3, 4, 2, 5
SCALE = 0.37
SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 8 + [2] * 2 + [0] * 2], np.int32)


def inputs(seed: int, *, shared_values: bool):
    rng = np.random.default_rng(seed)
    shapes = {
        "q_nope": (B, T, N, H),
        "q_rope": (B, T, N, R),
        "k_nope": (B, T, N, H),
        "k_rope": (B, T, R),
        "values": (B, T, W) if shared_values else (B, T, N, W),
    }
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def places() -> Places:
    return Places(jnp.tile(jnp.arange(T), (B, 1)), jnp.asarray(SEGMENTS))


def plain(x: dict[str, np.ndarray]) -> np.ndarray:
    out = np.empty((B, T, N, W))
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
        score = [
            x["q_nope"][b, t, n] @ x["k_nope"][b, s, n] + x["q_rope"][b, t, n] @ x["k_rope"][b, s]
            for s in seen
        ]
        weight = np.exp(SCALE * np.array(score))
        values = x["values"][b, seen] if x["values"].ndim == 3 else x["values"][b, seen, n]
        out[b, t, n] = weight / weight.sum() @ values
    return out


def ours(x: dict[str, jax.Array]) -> jax.Array:
    queries, keys = (x["q_nope"], x["q_rope"]), (x["k_nope"], x["k_rope"])
    return attend(queries, keys, x["values"], masks.within_rows(places()), scale=SCALE)


@pytest.mark.parametrize("shared_values", [False, True], ids=["own values", "shared values"])
@pytest.mark.parametrize("block", [1, 4, 6, 512])
def test_every_block_size_gives_the_plain_formula(block, shared_values, seed, monkeypatch):
    monkeypatch.setattr(attend_file, "QUERY_BLOCK", block)
    x = inputs(seed, shared_values=shared_values)
    with jax.enable_x64(True):
        found = ours({name: jnp.asarray(value) for name, value in x.items()})
    assert rel_err(found, plain(x)) < TOLERANCE["f64"]


@pytest.mark.parametrize("shared_values", [False, True], ids=["own values", "shared values"])
def test_heads_may_lie_over_tensor(shared_values, seed):
    """As where a prompt is read into a cache; what all heads share lies on every device."""
    x = inputs(seed, shared_values=shared_values)
    with jax.enable_x64(True), jax.set_mesh(sharding.make_mesh(jax.devices()[:N], tensor=N)):
        found = jax.jit(ours)(
            {
                name: sharding.reshard(
                    jnp.asarray(value), "batch", None, *("heads", None)[-(value.ndim - 2) :]
                )
                for name, value in x.items()
            }
        )
    assert rel_err(found, plain(x)) < TOLERANCE["f64"]


def test_gradients_of_the_blocks_are_those_of_the_plain_path(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    along = rng.standard_normal((B, T, N, W))
    with jax.enable_x64(True):
        x = {k: jnp.asarray(v) for k, v in inputs(seed, shared_values=False).items()}
        direction = {k: jnp.asarray(rng.standard_normal(v.shape)) for k, v in x.items()}

        def gradients(block: int):
            monkeypatch.setattr(attend_file, "QUERY_BLOCK", block)
            return jax.jit(jax.grad(lambda x: (ours(x) * along).sum()))(x)

        whole, blocked = gradients(512), gradients(4)
    for name in whole:
        assert rel_err(blocked[name], whole[name]) < TOLERANCE["f64"], name

    def value(step: float) -> float:
        moved = {k: np.asarray(x[k]) + step * np.asarray(direction[k]) for k in x}
        return float((plain(moved) * along).sum())

    slope = sum(float((np.asarray(blocked[k]) * np.asarray(direction[k])).sum()) for k in x)
    assert slope == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-6)


def test_a_long_row_never_forms_all_scores(monkeypatch):
    monkeypatch.setattr(attend_file, "QUERY_BLOCK", 4)
    x = {k: jnp.asarray(v, jnp.float32) for k, v in inputs(0, shared_values=False).items()}
    blocked = jax.jit(jax.grad(lambda x: ours(x).sum())).lower(x).as_text()
    assert f"{B}x{N}x4x{T}xf32" in blocked
    assert f"{B}x{N}x{T}x{T}xf32" not in blocked
    monkeypatch.setattr(attend_file, "QUERY_BLOCK", 512)
    assert f"{B}x{N}x{T}x{T}xf32" in jax.jit(jax.grad(lambda x: ours(x).sum())).lower(x).as_text()


def test_softmax_is_float32_for_bfloat16_inputs(seed):
    x = {k: jnp.asarray(v, jnp.bfloat16) for k, v in inputs(seed, shared_values=False).items()}
    found = ours(x)
    assert found.dtype == jnp.bfloat16
    expected = plain({k: np.asarray(v, np.float64) for k, v in x.items()})
    # One rounding of the weights and one of the result.
    assert rel_err(found, expected) < 2 * TOLERANCE["bf16"]
