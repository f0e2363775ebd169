"""Load counts and the sequence-wise balance loss, by hand and by loops over V3 eqs. 17-20."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.nn.balance import sequence_balance_loss, times_chosen
from tests.tolerance import TOLERANCE, rel_err


def test_loads_by_hand():
    choice_BTK = jnp.array([[[0, 1], [0, 2], [0, 3]], [[3, 1], [3, 1], [3, 1]]])
    counted_BT = jnp.array([[True, True, False], [True, True, True]])
    found = times_chosen(choice_BTK, counted_BT, 5)
    np.testing.assert_array_equal(found, [[2, 1, 1, 0, 0], [0, 3, 0, 3, 0]])


def test_even_use_costs_one_and_one_expert_for_all_costs_the_number_of_experts():
    even_BTE, one_BTE = jnp.full((1, 4, 4), 0.25), jnp.zeros((1, 4, 4)).at[..., 2].set(1.0)
    counted_BT = jnp.ones((1, 4), bool)
    around_BTK = jnp.arange(4)[None, :, None]
    assert sequence_balance_loss(even_BTE, around_BTK, counted_BT) == 1.0
    assert sequence_balance_loss(one_BTE, jnp.full((1, 4, 1), 2), counted_BT) == 4.0


def test_values_and_gradient_by_loops(seed):
    rng = np.random.default_rng(seed)
    B, T, E, K = 3, 7, 6, 2
    share_BTE = rng.random((B, T, E))
    share_BTE /= share_BTE.sum(-1, keepdims=True)
    wanted_BTK = np.argsort(-share_BTE, axis=-1)[..., :K].astype(np.int32)
    counted_BT = rng.random((B, T)) < 0.7
    counted_BT[1] = True
    counted_BT[2] = False  # a row of padding only
    expected_B, gradient = np.zeros(B), np.zeros_like(share_BTE)
    for b in range(2):
        tokens = [t for t in range(T) if counted_BT[b, t]]
        for e in range(E):
            often = E / (K * len(tokens)) * sum(e in wanted_BTK[b, t] for t in tokens)
            expected_B[b] += often * sum(share_BTE[b, t, e] for t in tokens) / len(tokens)
            gradient[b, tokens, e] = often / len(tokens)
    with jax.enable_x64(True):
        share, wanted, counted = (jnp.asarray(x) for x in (share_BTE, wanted_BTK, counted_BT))
        found_B = sequence_balance_loss(share, wanted, counted)
        found = jax.grad(lambda s: sequence_balance_loss(s, wanted, counted).sum())(share)
    assert rel_err(found_B, expected_B) < TOLERANCE["f64"]
    assert rel_err(found, gradient) < TOLERANCE["f64"]
