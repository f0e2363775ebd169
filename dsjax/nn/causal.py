"""Attention of packed rows over themselves: the best that there is for the chip and the shapes."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax import sharding
from dsjax.nn import masks
from dsjax.nn.attend import attend
from dsjax.nn.masks import Places


def causal(
    queries: Sequence[Float[Array, "B T N _"]],
    keys: Sequence[Float[Array, "B S *_"]],
    values: Float[Array, "B S N _"],
    places: Places,
    *,
    scale: float,
) -> Float[Array, "B T N _"]:
    """softmax(scale * sum_i queries_i . keys_i) values, over earlier tokens of the same document.

    A key without heads is shared by all. Keys and values lie in sequence, whole rows of them.
    """
    if sharding.platform() == "tpu":
        from dsjax.nn import splash

        if splash.fits(queries[0].shape[1], sharding.axis_size("context")):
            shape = values.shape[:-1]
            wide = [
                key if key.ndim == 4 else jnp.broadcast_to(key[:, :, None], (*shape, key.shape[-1]))
                for key in keys
            ]
            segments_BT = places.segments_BT
            if segments_BT is None:
                segments_BT = jnp.zeros_like(places.positions_BT)
            return splash.splash(
                jnp.concatenate(queries, axis=-1),
                jnp.concatenate([sharding.reshard(key, *splash.KEYS) for key in wide], axis=-1),
                values,
                segments_BT,
                masks.whole_rows(segments_BT, places),
                scale=scale,
                in_zigzag=places.index_BT is not None,
            )
    return attend(queries, keys, values, masks.within_rows(places), scale=scale)
