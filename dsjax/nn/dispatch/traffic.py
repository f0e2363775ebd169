"""How many rows and bytes each transport puts on the wire for given choices; NumPy, exact.

For comparing transports and planning meshes; the layer itself never asks.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dsjax.nn.dispatch.rounds import room


class Sent(NamedTuple):
    """`rows[r, s, d]` go from device s to device d in round r, padding included, none to itself.

    As many partial sums go back. Where there may be further rounds, backward computes all of them
    again, so their rows go there `twice`.
    """

    rows: Int[np.ndarray, "rounds A A"]
    twice: bool


def needed(choice_AMK: Int[np.ndarray, "A M K"], num_experts: int) -> Int[np.ndarray, "A A"]:
    """Rows of device s that have any business on device d: no transport of rows sends fewer."""
    size = len(choice_AMK)
    owner_AMK = choice_AMK // (num_experts // size)
    goes_AMA = (owner_AMK[..., None] == np.arange(size)).any(2)
    return goes_AMA.sum(1)


def _ring(choice_AMK, num_experts: int, fan_out: int) -> Sent:
    size, num_rows, _ = choice_AMK.shape
    return Sent(np.full((1, size, size), num_rows), False)


def _all_to_all(choice_AMK, num_experts: int, fan_out: int) -> Sent:
    size, num_rows, _ = choice_AMK.shape
    space = room(num_rows * fan_out / size, most=num_rows)
    rounds = -(-needed(choice_AMK, num_experts).max() // space)
    return Sent(np.full((rounds, size, size), space), space < num_rows)


def _ragged(choice_AMK, num_experts: int, fan_out: int) -> Sent:
    size, num_rows, _ = choice_AMK.shape
    space = room(num_rows * fan_out, most=num_rows * size)
    count_AA = needed(choice_AMK, num_experts)
    rounds = -(-count_AA.sum(0).max() // space)
    end_AA = count_AA.cumsum(0)
    bounds = (np.arange(rounds + 1) * space)[:, None, None]
    rows = np.diff(np.clip(bounds, end_AA - count_AA, end_AA), axis=0)
    return Sent(rows, space < num_rows * size)


SENT: dict[str, Callable[..., Sent]] = {
    "ring": _ring,
    "all_to_all": _all_to_all,
    "ragged": _ragged,
}


def sent(
    transport: str, choice_AMK: Int[np.ndarray, "A M K"], *, num_experts: int, fan_out: int
) -> Sent:
    """What goes over the wire when `choice_AMK` are the choices for each of A devices' M rows."""
    of_all = SENT[transport](choice_AMK, num_experts, fan_out)
    away_AA = 1 - np.eye(len(choice_AMK), dtype=of_all.rows.dtype)
    return of_all._replace(rows=of_all.rows * away_AA)


def bytes_sent(
    sent: Sent, *, hidden_size: int, num_chosen: int, itemsize: int, weight_itemsize: int = 4
) -> tuple[int, int]:
    """Bytes the busiest device sends in one layer, (forward, backward).

    A row of `hidden_size` numbers of `itemsize` bytes travels with its choices and weights and
    comes back bare; backward the gradients go the same ways.
    """
    bare, weights = hidden_size * itemsize, num_chosen * weight_itemsize
    there = bare + weights + num_chosen * 4
    out_A, back_A = sent.rows.sum((0, 2)), sent.rows.sum((0, 1))
    forward_A = out_A * there + back_A * bare
    backward_A = out_A * (bare + sent.twice * there) + back_A * (bare + weights)
    return int(forward_A.max()), int(backward_A.max())
