"""Latent attention against an independent NumPy model, and its three paths against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import sharding
from dsjax.config import Mla, Rope, Yarn
from dsjax.nn import masks
from dsjax.nn.masks import Places
from dsjax.nn.mla import MlaAttention
from tests.tolerance import TOLERANCE, rel_err

B, T, D, EPS = 2, 6, 10, 1e-3
YARN = Rope(theta=100.0, yarn=Yarn(factor=8.0, original_context=64))


def spec(q_lora_rank: int | None = 5, rope: Rope = YARN) -> Mla:
    return Mla(
        num_heads=3,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=4,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        rope=rope,
    )


def attention_and_inputs(config: Mla, seed: int):
    """Float64 weights and inputs; call inside `jax.enable_x64`."""
    rng = np.random.default_rng(seed)
    module = MlaAttention(config, D, std=1.0, eps=EPS, rngs=nnx.Rngs(0))
    module = jax.tree.map(
        lambda v: v.replace(jnp.asarray(rng.normal(0, 0.5, v.get_value().shape))),
        module,
        is_leaf=sharding.is_variable,
    )
    return module, jnp.asarray(rng.standard_normal((B, T, D)))


def rotated(x_R: np.ndarray, position: int) -> np.ndarray:
    """With the frequencies of YARN: pair 0 is kept, pair 1 is half way to eight times slower."""
    # 32 rotations over 64 tokens fall before pair 0, one rotation at pair 1.008.
    low, high = 0, 2
    base = np.array([1.0, 100.0**-0.5])
    slowed = np.clip((np.arange(2) - low) / (high - low), 0, 1)
    angle = position * (base * (1 - slowed) + base / 8 * slowed)
    turned = (x_R[0::2] + 1j * x_R[1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(-1)


def plain(module: MlaAttention, x_BTD, positions_BT, segments_BT) -> np.ndarray:
    """V2 eqs. 37-47, one token and one head at a time."""
    w = {k: np.asarray(v) for k, v in _weights(module).items()}
    c = module.config
    m = 0.1 * np.log(8.0) + 1.0
    scale = m * m / np.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean() + EPS) * weight

    out = np.zeros((B, T, D))
    for b in range(B):
        latents, shared = [], []
        for s in range(T):
            joint = x_BTD[b, s] @ w["kv_a_proj"]
            latents.append(norm(joint[: c.kv_lora_rank], w["kv_a_norm"]))
            shared.append(rotated(joint[c.kv_lora_rank :], positions_BT[b, s]))
        for t, n in np.ndindex(T, c.num_heads):
            if c.q_lora_rank is None:
                query = x_BTD[b, t] @ w["q_proj"][:, n]
            else:
                query = norm(x_BTD[b, t] @ w["q_a_proj"], w["q_a_norm"]) @ w["q_b_proj"][:, n]
            nope = query[: c.qk_nope_head_dim]
            turned = rotated(query[c.qk_nope_head_dim :], positions_BT[b, t])
            seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
            unfolded = [latents[s] @ w["kv_b_proj"][:, n] for s in seen]
            score = [
                scale * (nope @ kv[: c.qk_nope_head_dim] + turned @ shared[s])
                for kv, s in zip(unfolded, seen, strict=True)
            ]
            weight = np.exp(score) / np.exp(score).sum()
            value = weight @ np.array(unfolded)[:, c.qk_nope_head_dim :]
            out[b, t] += value @ w["o_proj"][n]
    return out


def _weights(module: MlaAttention) -> dict[str, jax.Array]:
    query = module.query
    names = {"kv_a_proj": module.kv_a_proj, "kv_b_proj": module.kv_b_proj, "o_proj": module.o_proj}
    names["kv_a_norm"] = module.kv_a_norm.scale
    if module.config.q_lora_rank is None:
        names["q_proj"] = query.q_proj
    else:
        names |= {"q_a_proj": query.q_a_proj, "q_b_proj": query.q_b_proj}
        names["q_a_norm"] = query.q_a_norm.scale
    return {name: variable[...] for name, variable in names.items()}


def packed() -> Places:
    positions_BT = jnp.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]], jnp.int32)
    return Places(positions_BT, jnp.array([[1] * 6, [1, 1, 1, 2, 2, 2]], jnp.int32))


@pytest.mark.parametrize("rank", [None, 5], ids=["plain queries", "latent queries"])
def test_values_are_those_of_the_equations(rank, seed):
    with jax.enable_x64(True):
        module, x_BTD = attention_and_inputs(spec(rank), seed)
        found, cache = jax.jit(MlaAttention.__call__)(module, x_BTD, packed())
        expected = plain(module, np.asarray(x_BTD), *(np.asarray(p) for p in packed()[:2]))
    assert cache is None
    assert rel_err(found, expected) < TOLERANCE["f64"]


def test_absorbed_and_expanded_are_one_function_in_values_and_gradients(seed):
    with jax.enable_x64(True):
        module, _ = attention_and_inputs(spec(), seed)
        rng = np.random.default_rng(seed)
        c = module.config
        shapes = [(B, T, 3, c.qk_nope_head_dim), (B, T, 3, c.qk_rope_head_dim)]
        shapes += [(B, T, c.kv_lora_rank), (B, T, c.qk_rope_head_dim)]
        inputs = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
        along = jnp.asarray(rng.standard_normal((B, T, 3, c.v_head_dim)))
        seen = masks.within_rows(packed())

        def value(path: str, module, inputs):
            out = getattr(module, path)(*inputs, seen)
            return (out * along).sum(), out

        grads = jax.grad(value, argnums=(1, 2), has_aux=True)
        expanded, absorbed = grads("expanded", module, inputs), grads("absorbed", module, inputs)
    for one, other in zip(jax.tree.leaves(expanded), jax.tree.leaves(absorbed), strict=True):
        assert rel_err(other, one) < TOLERANCE["f64"]


@pytest.mark.parametrize(
    "parts", [pytest.param([6], marks=pytest.mark.thorough), [4, 1, 1]], ids=str
)
def test_a_cache_fed_in_parts_gives_the_whole_row(parts, seed):
    with jax.enable_x64(True):
        module, x_BTD = attention_and_inputs(spec(), seed)
        positions_BT = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
        attend = jax.jit(MlaAttention.__call__)
        whole, _ = attend(module, x_BTD, Places(positions_BT))
        cache = module.init_cache(B, T + 3, jnp.dtype("float64"))
        found, start = [], 0
        for length in parts:
            stop = start + length
            places = Places(positions_BT[:, start:stop])
            y_BTD, cache = attend(module, x_BTD[:, start:stop], places, cache)
            found.append(y_BTD)
            start = stop
        assert rel_err(jnp.concatenate(found, axis=1), whole) < TOLERANCE["f64"]
        assert not any(np.any(x_LBSX[:, :, T:]) for x_LBSX in cache)


def test_rows_of_a_cache_may_stand_at_different_positions(seed):
    with jax.enable_x64(True):
        module, x_BTD = attention_and_inputs(spec(), seed)
        positions_BT = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
        whole, _ = module(x_BTD, Places(positions_BT))
        cache = module.init_cache(B, T, jnp.dtype("float64"))
        _, cache = module(x_BTD, Places(positions_BT), cache)
        # Row 0 repeats its token 2, row 1 its token 4; what lies behind must not be seen.
        at = np.array([2, 4])
        again = x_BTD[np.arange(B), at][:, None]
        y_BTD, _ = module(again, Places(jnp.asarray(at[:, None], jnp.int32)), cache)
        assert rel_err(y_BTD[:, 0], np.asarray(whole)[np.arange(B), at]) < TOLERANCE["f64"]


def test_the_cheaper_path_is_taken():
    v3 = Mla(
        num_heads=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    module = MlaAttention(v3, 4, std=1.0, eps=EPS, rngs=nnx.Rngs(0))
    # 512 * 256 / (1024 - 256) = 170.67 queries.
    assert module._absorbing_pays(170) and not module._absorbing_pays(171)


def test_positions_are_relative(seed):
    with jax.enable_x64(True):
        module, x_BTD = attention_and_inputs(spec(), seed)
        near, _ = module(x_BTD, Places(packed().positions_BT, packed().segments_BT))
        far, _ = module(x_BTD, Places(packed().positions_BT + 1000, packed().segments_BT))
        assert rel_err(far, near) < TOLERANCE["f64"]
