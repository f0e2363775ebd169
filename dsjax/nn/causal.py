"""Attention of packed rows over themselves: the best that there is for the chip and the shapes."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Float

from dsjax import sharding
from dsjax.nn import masks
from dsjax.nn.attend import attend
from dsjax.nn.context import Core, over_rows
from dsjax.nn.masks import Places


def causal(
    queries: Sequence[Float[Array, "B T N _"]],
    tokens: Sequence[Float[Array, "B T *_"]],
    weights: Any,
    unfold: Callable[..., tuple[Sequence[Array], Array]],
    places: Places,
    *,
    scale: float,
) -> Float[Array, "B T N _"]:
    """softmax(scale * sum_i queries_i . keys_i) values, over earlier tokens of the same document.

    `keys, values = unfold(tokens, weights)`: [B, S, N, X], or [B, S, X] for a key that all heads
    share. See `dsjax.nn.context` for what lies where.
    """
    core = _core(queries[0].shape, places, scale)
    in_zigzag = places.index_BT is not None
    return over_rows(core, queries, tokens, weights, unfold, in_zigzag=in_zigzag)


def _core(shape: tuple[int, ...], places: Places, scale: float) -> Core:
    if sharding.platform() == "tpu":
        from dsjax.nn import splash

        if splash.fits(shape[1], sharding.axis_size("context")):
            return splash.core(shape, places, scale=scale)
    seen = masks.within_rows(places)

    def plain(queries, keys, values, seen):
        return attend(queries, keys, values, seen, scale=scale)

    return Core(plain, seen, seen.specs(), checked=True)
