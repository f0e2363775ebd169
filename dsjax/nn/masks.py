"""Which token may look at which: causal order and document borders, as values."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from dsjax import sharding
from dsjax.nn import zigzag


class Places(NamedTuple):
    """Where tokens stand: rotary `positions_BT`, and `segments_BT`, the document of each (0: pad).

    `segments_BT=None` says that each row is one document. `index_BT` is the place of each token in
    its row where rows lie as `dsjax.nn.zigzag` has it; None: they lie in sequence.
    """

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"] | None = None
    index_BT: Int[Array, "B T"] | None = None


class Visibility(NamedTuple):
    """Query t sees key s if it does not come later and lies in the same document."""

    query_BT: Int[Array, "#B T"]
    key_BS: Int[Array, "#B S"]
    query_segment_BT: Int[Array, "B T"] | None = None
    key_segment_BS: Int[Array, "B S"] | None = None

    def specs(self) -> "Visibility":
        """How they lie on the mesh: queries cut like the rows that they come from, keys whole."""

        def spec(x_BX, length: str | None):
            if x_BX is None:
                return None
            return sharding.spec("batch" if len(x_BX) > 1 else None, length)

        return Visibility(
            spec(self.query_BT, "length"),
            spec(self.key_BS, None),
            spec(self.query_segment_BT, "length"),
            spec(self.key_segment_BS, None),
        )

    def matrix(self) -> Bool[Array, "#B T S"]:
        """True where query t may look at key s."""
        seen = self.query_BT[:, :, None] >= self.key_BS[:, None, :]
        if self.query_segment_BT is None:
            return seen
        return seen & (self.query_segment_BT[:, :, None] == self.key_segment_BS[:, None, :])


def within_rows(places: Places) -> Visibility:
    """Every token of the rows is query and key; order is the place in the row."""
    index_1S = jnp.arange(places.positions_BT.shape[1], dtype=jnp.int32)[None]
    in_sequence_1T = sharding.reshard(index_1S, None, "length")
    query_BT = in_sequence_1T if places.index_BT is None else places.index_BT
    segments = places.segments_BT
    key_segments = None if segments is None else whole_rows(segments, places)
    return Visibility(query_BT, index_1S, segments, key_segments)


def whole_rows(x: Shaped[Array, "B T *_"], places: Places) -> Shaped[Array, "B S *_"]:
    """What belongs to the tokens of whole rows, gathered and in sequence, on every device."""
    x = sharding.reshard(x, "batch", *(None,) * (x.ndim - 1))
    if places.index_BT is None:
        return x
    return zigzag.in_sequence(x, sharding.axis_size("context"))


def over_cache(places: Places, num_slots: int) -> Visibility:
    """Queries look back over a cache whose slot s holds the token of position s."""
    return Visibility(places.positions_BT, jnp.arange(num_slots, dtype=jnp.int32)[None])
