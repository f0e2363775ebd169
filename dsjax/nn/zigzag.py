"""Causal work shared evenly by devices that cut a row: device i takes chunks i and 2n - 1 - i.

A query sees all that stands before it: of n contiguous pieces of a row, the last has about 2n - 1
times the visible pairs of the first. Cut into 2n chunks, early ones paired with late ones, all
devices have the same number: T (T + 1) / 2n of one document. Packed documents balance only roughly.
The context parallelism of Llama 3 does this (arXiv 2407.21783, section 3.3.2).

Chunks lie so only where a row is cut. Keys that are gathered whole go back into sequence.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def order(length: int, num_devices: int) -> Int[np.ndarray, " T"]:
    """The token at each place of the row as it lies: x[order] is x laid out."""
    return np.arange(length).reshape(_chunks(length, num_devices), -1)[_turn(num_devices)].ravel()


def inverse(length: int, num_devices: int) -> Int[np.ndarray, " T"]:
    """The place of each token: laid_out[inverse] is in sequence again."""
    return np.argsort(order(length, num_devices))


def lay_out(x: Shaped[Array, "..."], num_devices: int, *, axis: int = 1) -> Shaped[Array, "..."]:
    """`x` with its length, whole along `axis`, in the order in which n devices take equal pieces.

    To be resharded over the length next. Chunks are sliced and joined, not gathered by index, so
    that the gradient does the same and never scatters.
    """
    return _moved(x, _turn(num_devices), axis)


def in_sequence(
    x: Shaped[Array, "..."], num_devices: int, *, axis: int = 1
) -> Shaped[Array, "..."]:
    """`lay_out` undone, on an `x` whose length has been gathered."""
    return _moved(x, np.argsort(_turn(num_devices)), axis)


def _turn(num_devices: int) -> Int[np.ndarray, " chunks"]:
    """The chunk at each place: 0, 2n - 1, 1, 2n - 2, ..."""
    early = np.arange(num_devices)
    return np.stack([early, 2 * num_devices - 1 - early], axis=1).ravel()


def _chunks(length: int, num_devices: int) -> int:
    """How many chunks a row is cut into: two for each device."""
    if num_devices < 1 or length % (2 * num_devices):
        raise ValueError(
            f"a length of {length} does not divide into two chunks for each of {num_devices} "
            f"devices; choose a multiple of {2 * max(num_devices, 1)}"
        )
    return 2 * num_devices


def _moved(x, turn: Int[np.ndarray, " chunks"], axis: int):
    chunks = jnp.split(x, _chunks(x.shape[axis], len(turn) // 2), axis)
    return jnp.concatenate([chunks[chunk] for chunk in turn], axis)
