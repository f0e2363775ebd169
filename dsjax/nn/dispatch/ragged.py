"""Each row once to every device that owns any of its experts, and nothing else on the wire."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.dispatch.all_to_all import owners
from dsjax.nn.dispatch.local import Experts, through_experts
from dsjax.nn.dispatch.placing import collected, pairs_by, placed
from dsjax.nn.dispatch.rounds import over_rounds, room
from dsjax.nn.dispatch.rows import Group, Rows
from dsjax.nn.precision import products


class Trip(NamedTuple):
    """The slices that this device sends to and gets from each of the A devices of the group.

    In the order of `lax.ragged_all_to_all`: offsets in its own buffer, sizes, offsets in the
    receivers' buffers, and sizes of what it gets.
    """

    from_A: Int[Array, " A"]
    sent_A: Int[Array, " A"]
    to_A: Int[Array, " A"]
    got_A: Int[Array, " A"]


def trips(
    count_AA: Int[Array, "A A"], low: Int[Array, ""], space: int, rank: Int[Array, ""]
) -> tuple[Trip, Trip]:
    """There and back for device `rank`, when device s has count[s, d] rows for device d.

    Senders hold rows sorted by receiver. A receiver's rows are numbered by sender; those numbered
    [low, low + space) are sent.
    """
    in_sender_AA = jnp.cumsum(count_AA, axis=1, dtype=jnp.int32) - count_AA
    start_AA = jnp.cumsum(count_AA, axis=0, dtype=jnp.int32) - count_AA
    first_AA = jnp.clip(low, start_AA, start_AA + count_AA)
    size_AA = jnp.clip(low + space, start_AA, start_AA + count_AA) - first_AA
    held_AA = in_sender_AA + first_AA - start_AA  # where the slice begins in its sender's buffer,
    kept_AA = jnp.clip(first_AA - low, 0, space)  # and in its receiver's
    there = Trip(held_AA[rank], size_AA[rank], kept_AA[rank], size_AA[:, rank])
    back = Trip(kept_AA[:, rank], size_AA[:, rank], held_AA[:, rank], size_AA[rank])
    return there, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def moved(
    collective: Callable,
    axes: tuple[str, ...],
    sizes: tuple[int, int],
    x: Float[Array, "U D"],
    there: Trip,
    back: Trip,
) -> Float[Array, "V D"]:
    """`x` after the trip there, in a buffer of sizes[1] places; zeros where nothing comes.

    Backward is the trip back into sizes[0] places: lax's own rule does more, as it also
    differentiates what a buffer held before.
    """
    return _carried(collective, axes, x, there, sizes[1])


def _carried(collective, axes, x, trip, size, fill=0):
    empty = jnp.full_like(x, fill, shape=(size, *x.shape[1:]))
    return collective(x, empty, *trip, axis_name=axes)


moved.defvjp(
    lambda collective, axes, sizes, x, there, back: (
        _carried(collective, axes, x, there, sizes[1]),
        back,
    ),
    lambda collective, axes, sizes, back, grad: (
        _carried(collective, axes, grad, back, sizes[0]),
        None,
        None,
    ),
)


def room_per_round(num_rows: int, group: Group) -> int:
    """Places for what all devices of the group, with `num_rows` each, send to one of them."""
    return room(num_rows * group.fan_out, most=num_rows * group.size)


def ragged(
    rows: Rows, experts: Experts, group: Group, *, collective=jax.lax.ragged_all_to_all
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """The sum over each row's experts, and how many pairs the experts here were given.

    As `all_to_all`, with slices of exact sizes in place of padded ones, and one room for what comes
    from all devices together. XLA has the collective for TPU and GPU, not for CPU.
    """
    num_rows, num_pairs = rows.x_MD.shape[0], rows.choice_MK.size
    num_sent = num_rows * group.fan_out
    space = room_per_round(num_rows, group)
    pairs = pairs_by(owners(rows.choice_MK, group), group.size)
    count_AA = jax.lax.all_gather(pairs.size_A, group.axes)

    def step(index, floats, ints):
        (x_MD, weight_MK, experts), (choice_MK, pairs, count_AA) = floats, ints
        block, _ = pairs.between(jnp.int32(0), num_sent)
        there, back = trips(count_AA, index * space, space, group.rank)
        carry = functools.partial(moved, collective, group.axes)

        def send(x, there, back):
            return carry((num_sent, space), x, there, back)

        def bring(x, there, back):
            return carry((space, num_sent), x, back, there)

        choice_UK = choice_MK[block.row_U]
        received = Rows(
            products.value.sent(send, bring, placed(x_MD, block), there, back),
            _carried(collective, group.axes, choice_UK, there, space, fill=group.nobody),
            send(placed(weight_MK, block), there, back),
        )
        y_UD, given = through_experts(
            received,
            experts,
            first=group.rank * group.num_local,
            num_local=group.num_local,
            even_share=num_pairs,
        )
        returned_UD = products.value.returned(bring, send, y_UD, there, back)
        return collected(returned_UD, block), given

    return over_rounds(
        step,
        (rows.x_MD, rows.weight_MK, experts),
        (rows.choice_MK, pairs, count_AA),
        group.agreed(-(-count_AA.sum(0).max() // space)),
        most=-(-num_rows * group.size // space),
    )
