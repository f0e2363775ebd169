"""Attention of packed rows over themselves on each device: its heads, its queries, all keys.

Along `context` a device gathers what keys and values are made of, in MLA the latent and the rotated
key: C + R numbers for each token, forward, and as many of their gradient summed back. Keys and
values themselves, N (H + R + W) numbers, are unfolded by every device for itself and never travel.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from dsjax import sharding
from dsjax.nn import zigzag

QUERIES = ("batch", "length", "heads", None)


class Core(NamedTuple):
    """Softmax attention of one device: `attend(queries, keys, values, operands)`.

    `specs` tells how `operands` lie on the mesh. `checked`: whether jax can follow along which mesh
    axes the result varies; a kernel may not say.
    """

    attend: Callable[..., Array]
    operands: Any
    specs: Any
    checked: bool


def over_rows(
    core: Core,
    queries: Sequence[Float[Array, "B T N _"]],
    tokens: Sequence[Float[Array, "B T *_"]],
    weights: Any,
    unfold: Callable[..., tuple[Sequence[Array], Array]],
    *,
    in_zigzag: bool,
) -> Float[Array, "B T N _"]:
    """`core` over `keys, values = unfold(tokens, weights)` of whole rows, in sequence.

    Queries and tokens are cut over the length alike, in pieces or as `dsjax.nn.zigzag` has it.
    """

    # Queries made by weights in FP8, which no device has cut, are not cut by heads yet.
    queries = tuple(sharding.reshard(query, *QUERIES) for query in queries)
    leaves, structure = jax.tree.flatten(weights)

    def on_device(queries, tokens, leaves, operands):
        parts = sharding.axis_size("context")
        whole = [sharding.gathered(x, "context", axis=1) for x in tokens]
        if in_zigzag:
            whole = [zigzag.in_sequence(x, parts) for x in whole]
        keys, values = unfold(whole, structure.unflatten(leaves))
        return core.attend(queries, keys, values, operands)

    where = sharding.spec(*QUERIES)
    in_specs = (
        tuple(where for _ in queries),
        *(jax.tree.map(sharding.held, x) for x in (tuple(tokens), leaves)),
        core.specs,
    )
    return sharding.local(on_device, in_specs, where, checked=core.checked)(
        queries, tuple(tokens), leaves, core.operands
    )
