"""Rows through the experts that this device owns, a window of sorted pairs at a time."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.dispatch.placing import combined, first_marked, pairs_by, placed
from dsjax.nn.dispatch.rounds import over_rounds, room
from dsjax.nn.dispatch.rows import Rows

# Rows sorted by expert and how many each expert has; a pytree, so that its weights have gradients.
Experts = Callable[[Float[Array, "U D"], Int[Array, " E"]], Float[Array, "U D"]]


def through_experts(
    rows: Rows,
    experts: Experts,
    *,
    first: int | Int[Array, ""],
    num_local: int,
    even_share: int,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """sum_k weight_k * expert_k(x) over the experts [first, first + num_local), and pairs given.

    Rows are copied once for each of their experts here, but only a window of such pairs at a time:
    room for the `even_share` of them and some more, so memory does not grow with the rows that
    have no business here.
    """
    # Long dimension last: there chips have lanes.
    local_JM, weight_JM = rows.choice_MK.T - first, rows.weight_MK.T
    local_JM = jnp.where((local_JM >= 0) & (local_JM < num_local), local_JM, num_local)
    if num_local < local_JM.shape[0]:
        # No row has more business here than there are experts; its other columns are empty.
        taken_JKM = first_marked(local_JM < num_local, num_local)
        local_JM = num_local - jnp.where(taken_JKM, num_local - local_JM[None], 0).sum(
            1, dtype=jnp.int32
        )
        # Not by index: the gradient of that is a scatter.
        weight_JM = jnp.where(taken_JKM, weight_JM[None], 0).sum(1)
    window = room(even_share, most=local_JM.size)
    pairs = pairs_by(local_JM, num_local)

    def step(index, floats, pairs):
        x_MD, weight_JM, experts = floats
        block, size_E = pairs.between(index * window, window)
        y_UD = experts(placed(x_MD, block), size_E)
        return combined(y_UD, weight_JM, block), size_E.sum(dtype=jnp.int32)

    return over_rounds(
        step,
        (rows.x_MD, weight_JM, experts),
        pairs,
        -(-pairs.total // window),
        most=-(-local_JM.size // window),
    )
