"""How evenly experts are used: load counts and the sequence-wise balance loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def times_chosen(
    choice_BTK: Int[Array, "B T K"], counted_BT: Bool[Array, "B T"], num_experts: int
) -> Float[Array, "B E"]:
    """How many counted tokens of each row went to each expert."""
    hits_BTKE = choice_BTK[..., None] == jnp.arange(num_experts, dtype=jnp.int32)[None, None, None]
    return (hits_BTKE & counted_BT[:, :, None, None]).sum((1, 2), dtype=jnp.float32)


def sequence_balance_loss(
    share_BTE: Float[Array, "B T E"],
    wanted_BTK: Int[Array, "B T K"],
    counted_BT: Bool[Array, "B T"],
    sum_over_length=lambda x: x,
) -> Float[Array, " B"]:
    """sum_i f_i P_i of each row, without alpha (V3 report eqs. 17-20).

        f_i = E / (K T) * #(t : i among the K best of s_t),   P_i = mean_t s'_{i,t}

    Over the counted tokens; 1 is perfect balance. `sum_over_length` completes sums over T when the
    row is cut across devices.
    """
    num_experts, num_chosen = share_BTE.shape[-1], wanted_BTK.shape[-1]
    tokens_B1 = sum_over_length(counted_BT.sum(-1, dtype=share_BTE.dtype))[:, None]
    tokens_B1 = jnp.maximum(tokens_B1, 1)
    hits_BE = sum_over_length(times_chosen(wanted_BTK, counted_BT, num_experts))
    often_BE = num_experts / num_chosen * hits_BE.astype(share_BTE.dtype) / tokens_B1
    share_BE = sum_over_length(jnp.where(counted_BT[:, :, None], share_BTE, 0).sum(1)) / tokens_B1
    return (jax.lax.stop_gradient(often_BE) * share_BE).sum(-1)
