"""Every row to every device, every partial sum back: an all-gather and a reduce-scatter."""

import jax
from jaxtyping import Array, Float, Int

from dsjax.nn.dispatch.local import Experts, through_experts
from dsjax.nn.dispatch.rows import Group, Rows
from dsjax.nn.precision import products


def ring(rows: Rows, experts: Experts, group: Group) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """The sum over each row's experts, and how many pairs the experts here were given.

    Named after the way these two collectives go: every row passes along a ring of all devices and
    its sum is collected on the way, so each device sends its rows size - 1 times, whatever was
    chosen. That is as good as any where a token's experts lie on most devices of the group, and
    needs no agreement on sizes. Backward the gather becomes a reduce-scatter and the reverse.
    """

    def gather(x):
        return jax.lax.all_gather(x, group.axes, axis=0, tiled=True)

    def scatter(x):
        return jax.lax.psum_scatter(x, group.axes, scatter_dimension=0, tiled=True)

    x_MD = products.value.sent(gather, scatter, rows.x_MD)
    y_MD, given = through_experts(
        Rows(x_MD, gather(rows.choice_MK), gather(rows.weight_MK)),
        experts,
        first=group.rank * group.num_local,
        num_local=group.num_local,
        even_share=rows.choice_MK.size,
    )
    return products.value.returned(scatter, gather, y_MD), given
