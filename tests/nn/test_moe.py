"""The mixture of experts against a NumPy loop over tokens and experts, under every kind of load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import sharding
from dsjax.config import Moe, SigmoidRouter, SoftmaxRouter
from dsjax.nn import moe
from dsjax.nn.dispatch import dispatch
from dsjax.nn.dispatch.local import through_experts
from dsjax.nn.dispatch.rounds import room
from dsjax.nn.dispatch.rows import Rows
from dsjax.nn.moe import MoeFfn
from tests.tolerance import TOLERANCE, rel_err

B, T, D, E, K, F = 2, 9, 6, 8, 3, 5


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer(router, seed: int, *, num_shared: int = 1):
    """Float64; call inside `jax.enable_x64`."""
    rng = np.random.default_rng(seed)
    config = Moe(
        num_experts=E, num_chosen=K, num_shared=num_shared, intermediate_size=F, router=router
    )
    module = MoeFfn(config, D, std=1.0, rngs=nnx.Rngs(0))
    return jax.tree.map(
        lambda v: v.replace(jnp.asarray(rng.standard_normal(v.get_value().shape))),
        module,
        is_leaf=sharding.is_variable,
    ), jnp.asarray(rng.standard_normal((B, T, D)))


def weights(module: MoeFfn) -> dict[str, np.ndarray]:
    found = {
        "gate": module.router.gate_proj,
        "gate_up": module.experts.gate_up_proj,
        "down": module.experts.down_proj,
    }
    if module.shared is not None:
        found["shared_gate_up"] = module.shared.gate_up_proj
        found["shared_down"] = module.shared.down_proj
    return {name: np.asarray(variable[...]) for name, variable in found.items()}


def plain(w: dict[str, np.ndarray], x_MD: np.ndarray, choice_MK: np.ndarray, router) -> np.ndarray:
    """For a choice already made, which small moves of the weights do not change."""
    logits_ME = x_MD @ w["gate"]
    if isinstance(router, SigmoidRouter):
        score_ME = 1 / (1 + np.exp(-logits_ME))
    else:
        score_ME = np.exp(logits_ME) / np.exp(logits_ME).sum(-1, keepdims=True)
    y_MD = np.zeros_like(x_MD)
    for m, x_D in enumerate(x_MD):
        picked_K = score_ME[m, choice_MK[m]]
        if router.normalize:
            picked_K = picked_K / picked_K.sum()
        for expert, weight in zip(choice_MK[m], picked_K * router.scale, strict=True):
            gate_F, up_F = np.einsum("d,dpf->pf", x_D, w["gate_up"][expert])
            y_MD[m] += weight * (silu(gate_F) * up_F) @ w["down"][expert]
        if "shared_down" in w:
            gate_F, up_F = np.einsum("d,dpf->pf", x_D, w["shared_gate_up"])
            y_MD[m] += (silu(gate_F) * up_F) @ w["shared_down"]
    return y_MD


# What the bias of a sigmoid router makes of the load.
SKEWS = {
    "free": np.zeros(E),
    "half of the experts empty": np.where(np.arange(E) % 2, -9.0, 0.0),
    "all tokens to three experts": np.where(np.isin(np.arange(E), [1, 2, 6]), 9.0, 0.0),
    "one expert takes a third": np.where(np.arange(E) == 7, 9.0, 0.0),
}


@pytest.mark.parametrize("skew", SKEWS)
def test_values_and_all_gradients_under_every_load(skew, seed):
    router = SigmoidRouter(scale=2.5)
    with jax.enable_x64(True):
        module, x_BTD = layer(router, seed)
        module.router.bias[...] = jnp.asarray(SKEWS[skew])
        check(module, x_BTD, router, seed)


@pytest.mark.parametrize("num_shared", [0, pytest.param(2, marks=pytest.mark.thorough)])
def test_softmax_router_with_and_without_shared_experts(num_shared, seed):
    router = SoftmaxRouter(num_groups=4, kept_groups=2, scale=16.0)
    with jax.enable_x64(True):
        module, x_BTD = layer(router, seed, num_shared=num_shared)
        check(module, x_BTD, router, seed)


def check(module: MoeFfn, x_BTD: jax.Array, router, seed: int) -> None:
    rng = np.random.default_rng(seed + 1)
    counted_BT = jnp.ones((B, T), bool).at[1, -2:].set(False)
    along = jnp.asarray(rng.standard_normal((B, T, D)))

    @jax.jit
    def value(module, x_BTD):
        y_BTD, stats = module(x_BTD, counted_BT)
        return (y_BTD * along).sum(), (y_BTD, stats)

    (of_module, of_x), (y_BTD, stats) = jax.grad(value, argnums=(0, 1), has_aux=True)(module, x_BTD)
    w, x_MD = weights(module), np.asarray(x_BTD).reshape(-1, D)
    choice_MK = np.asarray(module.router(jnp.asarray(x_MD)).choice_MK)
    assert rel_err(y_BTD.reshape(-1, D), plain(w, x_MD, choice_MK, router)) < TOLERANCE["f64"]

    # Padding takes part in the product and not in the statistics.
    counted_M = np.asarray(counted_BT).reshape(-1)
    load_E = np.bincount(choice_MK[counted_M].reshape(-1), minlength=E)
    np.testing.assert_array_equal(stats.load_E, load_E)

    gradients = weights(of_module) | {"x": np.asarray(of_x).reshape(-1, D)}
    for name, values in (w | {"x": x_MD}).items():
        move = rng.standard_normal(values.shape)

        def at(step: float, name=name, move=move, values=values) -> float:
            moved = w | {"x": x_MD} | {name: values + step * move}
            x_moved = moved.pop("x")
            out = plain(moved, x_moved, choice_MK, router)
            return float((out * np.asarray(along).reshape(-1, D)).sum())

        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        assert float((gradients[name] * move).sum()) == pytest.approx(slope, rel=1e-6), name
    empty = load_E == 0
    if counted_M.all():
        assert not gradients["down"][empty].any()


def _scaled(factor_E, x_UD, size_E):
    """Experts that multiply by a number each; rows behind the last expert's give zeros."""
    places = x_UD.shape[0]
    of_row_U = jnp.repeat(factor_E, size_E, total_repeat_length=places)
    mine_U = jnp.arange(places) < size_E.sum()
    return jnp.where(mine_U[:, None], x_UD * of_row_U[:, None], 0.0)


@pytest.mark.thorough
def test_slices_of_the_experts_add_up_to_the_layer(seed):
    """What devices that share the experts do: each its own, nothing for those of others."""
    rng = np.random.default_rng(seed)
    x_MD = jnp.asarray(rng.standard_normal((90, 4)), jnp.float32)
    choice_MK = jnp.asarray([rng.choice(6, 2, replace=False) for _ in range(90)], jnp.int32)
    rows = Rows(x_MD, choice_MK, jnp.asarray(rng.random((90, 2)), jnp.float32))
    factor_E = jnp.asarray(rng.standard_normal(6), jnp.float32)

    def part(first: int, count: int, even_share: int):
        experts = jax.tree_util.Partial(_scaled, factor_E[first : first + count])
        return through_experts(rows, experts, first=first, num_local=count, even_share=even_share)

    weight_MK = np.asarray(rows.weight_MK) * np.asarray(factor_E)[choice_MK]
    expected = weight_MK.sum(-1)[:, None] * np.asarray(x_MD)
    whole, given = part(0, 6, 180)
    assert rel_err(whole, expected) < TOLERANCE["f32"] and given == 180
    # The middle one has room for 40 pairs at a time and gets about 90.
    parts, counts = zip(part(0, 2, 60), part(2, 3, 15), part(5, 1, 30), strict=True)
    assert rel_err(sum(parts), expected) < TOLERANCE["f32"] and sum(counts) == 180
    assert counts[1] > 2 * 40 == 2 * room(15, most=180)


def test_pairs_that_reach_no_expert_are_counted(monkeypatch):
    def lossy(rows, experts, group):
        lost = rows._replace(choice_MK=rows.choice_MK.at[:, -1].set(E))
        return dispatch(lost, experts, group)

    with jax.enable_x64(True):
        module, x_BTD = layer(SoftmaxRouter(), 0)
        counted_BT = jnp.ones((B, T), bool)
        assert jax.jit(lambda module: module(x_BTD, counted_BT)[1].dropped)(module) == 0
        monkeypatch.setattr(moe, "dispatch", lossy)
        assert jax.jit(lambda module: module(x_BTD, counted_BT)[1].dropped)(module) == B * T
