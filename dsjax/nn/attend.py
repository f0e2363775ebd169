"""Softmax attention with bounded memory: the plain computation, a block of queries at a time."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from dsjax import sharding
from dsjax.nn.masks import Visibility

QUERY_BLOCK = 512


def equal_parts(length: int, *, at_most: int, least: int = 1) -> int:
    """The fewest equal parts, `least` or more, of at most `at_most` that `length` divides into."""
    parts = range(min(least, length), length + 1)
    return next(n for n in parts if length % n == 0 and length // n <= at_most)


def attend(
    queries: Sequence[Float[Array, "B T N _"]],
    keys: Sequence[Float[Array, "B S *_"]],
    values: Float[Array, "B S *N _"],
    visibility: Visibility,
    *,
    scale: float,
) -> Float[Array, "B T N _"]:
    """softmax(scale * sum_i queries_i . keys_i, over visible keys) values; softmax in FP32.

    Keys and values are [B, S, N, X], or [B, S, X] when all heads share them. Score matrices of more
    than `QUERY_BLOCK` queries are never formed: the blocks are scanned and recomputed in backward.
    """
    if values.ndim == 4:
        queries, keys = zip(joined(queries, keys, values.shape[2]), strict=True)
    blocks = equal_parts(queries[0].shape[1], at_most=QUERY_BLOCK)
    if blocks == 1:
        return _attend(queries, keys, values, visibility, scale)

    # Strided blocks leave the major part of a sharded length where it is.
    def split(x):
        return rearrange(x, "b (q n) ... -> n b q ...", n=blocks)

    rows = (
        tuple(split(q) for q in queries),
        split(visibility.query_BT),
        None if visibility.query_segment_BT is None else split(visibility.query_segment_BT),
    )

    @jax.checkpoint
    def block(_, row):
        queries, query_BT, segment_BT = row
        seen = visibility._replace(query_BT=query_BT, query_segment_BT=segment_BT)
        return None, _attend(queries, keys, values, seen, scale)

    _, out = jax.lax.scan(block, None, rows)
    return rearrange(out, "n b q ... -> b (q n) ...")


def joined(
    queries: Sequence[Float[Array, "B T N _"]], keys: Sequence[Float[Array, "B S *_"]], heads: int
) -> tuple[Float[Array, "B T N X"], Float[Array, "B S N X"]]:
    """One query and one key per head, so that scores are one product and not a sum of several."""

    def with_heads(key):
        if key.ndim == 4:
            return key
        shared = jnp.broadcast_to(key[:, :, None], (*key.shape[:2], heads, key.shape[2]))
        return sharding.reshard(shared, "batch", None, "heads", None)

    return jnp.concatenate(queries, axis=-1), jnp.concatenate(list(map(with_heads, keys)), axis=-1)


def _attend(queries, keys, values, visibility: Visibility, scale: float):
    wide = np.promote_types(queries[0].dtype, jnp.float32)
    scores_BNTS = sum(
        jnp.einsum(
            "BTNX,BSNX->BNTS" if key.ndim == 4 else "BTNX,BSX->BNTS",
            query,
            key,
            preferred_element_type=wide,
        )
        for query, key in zip(queries, keys, strict=True)
    )
    seen_B1TS = visibility.matrix()[:, None]
    weights_BNTS = jax.nn.softmax(jnp.where(seen_B1TS, scores_BNTS * scale, -jnp.inf), axis=-1)
    weights_BNTS = weights_BNTS.astype(values.dtype)
    subscripts = "BNTS,BSNX->BTNX" if values.ndim == 4 else "BNTS,BSX->BTNX"
    return jnp.einsum(subscripts, weights_BNTS, values)
