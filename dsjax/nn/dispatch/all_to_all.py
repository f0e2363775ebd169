"""Each row once to every device that owns any of its experts, in buffers of a fixed size."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.dispatch.local import Experts, through_experts
from dsjax.nn.dispatch.placing import Pairs, collected, first_marked, pairs_by, placed
from dsjax.nn.dispatch.rounds import over_rounds, room
from dsjax.nn.dispatch.rows import Group, Rows
from dsjax.nn.precision import products


def owners(choice_MK: Int[Array, "M K"], group: Group) -> Int[Array, "J M"]:
    """The devices that own a row's experts, each once, J = `group.fan_out`; `group.size` is none.

    Once per device and not per expert: that is what makes node-limited routing save traffic.
    """
    owner_KM = jnp.minimum(choice_MK.T // group.num_local, group.size)
    same_KKM = owner_KM[:, None] == owner_KM[None]
    earlier_KK = jnp.tri(len(owner_KM), k=-1, dtype=bool)
    is_first_KM = (owner_KM < group.size) & ~(same_KKM & earlier_KK[:, :, None]).any(1)
    taken_JKM = first_marked(is_first_KM, group.fan_out)
    return group.size - jnp.where(taken_JKM, group.size - owner_KM[None], 0).sum(1, dtype=jnp.int32)


def room_per_device(num_rows: int, group: Group) -> int:
    """Places in the buffer of `num_rows` rows' device for each device of the group."""
    return room(num_rows * group.fan_out / group.size, most=num_rows)


def all_to_all(
    rows: Rows, experts: Experts, group: Group
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """The sum over each row's experts, and how many pairs the experts here were given.

    Choices and weights travel beside the rows, partial sums come back the same way. Rows beyond a
    device's room go in further rounds, of which all devices take equally many.
    """
    num_rows, num_pairs = rows.x_MD.shape[0], rows.choice_MK.size
    space = room_per_device(num_rows, group)
    pairs = pairs_by(owners(rows.choice_MK, group), group.size)

    def swapped(x):
        return jax.lax.all_to_all(x, group.axes, 0, 0, tiled=True)

    def step(index, floats, ints: tuple[Int[Array, "M K"], Pairs]):
        (x_MD, weight_MK, experts), (choice_MK, pairs) = floats, ints
        block = pairs.for_each(index * space, space)
        choice_UK = jnp.where(block.used_U[:, None], choice_MK[block.row_U], group.nobody)
        arrived_UD = products.value.sent(swapped, swapped, placed(x_MD, block))
        y_UD, given = through_experts(
            Rows(arrived_UD, swapped(choice_UK), swapped(placed(weight_MK, block))),
            experts,
            first=group.rank * group.num_local,
            num_local=group.num_local,
            even_share=num_pairs,
        )
        return collected(products.value.returned(swapped, swapped, y_UD), block), given

    return over_rounds(
        step,
        (rows.x_MD, rows.weight_MK, experts),
        (rows.choice_MK, pairs),
        group.agreed(-(-pairs.size_A.max() // space)),
        most=-(-num_rows // space),
    )
