"""What backward recomputes and what it keeps, by name; the layers mark their values for it."""

import functools
from collections.abc import Callable

import jax

# The residual stream where a layer begins: all that "full" keeps, and what "offload" sends away.
LAYER_INPUT = "layer_input"
# The narrowest that attention's inputs get: 576 numbers per token and layer in V3, and the 1,536 of
# its compressed queries.
LATENTS = "latents"

_policies = jax.checkpoint_policies

# Around the body of one layer. "full" keeps the layer's input and recomputes the rest.
# "save_latents" also keeps attention's latents, so that its down projections and, over `tensor`,
# their gathering are not repeated. "offload" is "full" with the inputs in the host's memory until
# backward wants them.
REMAT: dict[str, Callable] = {
    "full": jax.checkpoint,
    "none": lambda body: body,
    "save_latents": functools.partial(
        jax.checkpoint, policy=_policies.save_only_these_names(LATENTS)
    ),
    "offload": functools.partial(
        jax.checkpoint,
        policy=_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}
