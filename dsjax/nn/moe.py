"""Mixture of experts: router, routed experts across the mesh, shared experts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from dsjax import sharding
from dsjax.config import Moe
from dsjax.nn.balance import sequence_balance_loss, times_chosen
from dsjax.nn.dispatch import dispatch
from dsjax.nn.mlp import SwiGlu
from dsjax.nn.router import GATES
from dsjax.params import normal
from pallas_kernels.grouped_matmul import grouped_matmul


class MoeStats(NamedTuple):
    """`load_E`: tokens of the batch per expert. `balance_B`: sequence-wise loss of each row.

    `dropped`: pairs of token and chosen expert that no expert was given, padding included.
    """

    load_E: Float[Array, " E"]
    balance_B: Float[Array, " B"]
    dropped: Float[Array, ""]


class Experts(nnx.Module):
    """SwiGLU experts over rows sorted by expert."""

    def __init__(self, config: Moe, hidden_size: int, *, std: float, rngs: nnx.Rngs):
        num, width = config.num_experts, config.intermediate_size
        self.gate_up_proj = normal(
            rngs, (num, hidden_size, 2, width), ("experts", "embed", None, "ffn"), std=std
        )
        self.down_proj = normal(
            rngs, (num, width, hidden_size), ("experts", "ffn", "embed"), std=std
        )

    def __call__(self, rows_MD, sizes_E):
        gate_up_EDX = rearrange(self.gate_up_proj[...], "e d p f -> e d (p f)")
        gate_MF, up_MF = jnp.split(grouped_matmul(rows_MD, gate_up_EDX, sizes_E), 2, axis=-1)
        return grouped_matmul(jax.nn.silu(gate_MF) * up_MF, self.down_proj[...], sizes_E)


class MoeFfn(nnx.Module):
    """y = sum_k g_k E_k(x) + E_shared(x) (V3 report eq. 12); shared experts are one wide SwiGLU."""

    def __init__(self, config: Moe, hidden_size: int, *, std: float, rngs: nnx.Rngs):
        self.config = config
        gate = GATES[type(config.router)]
        self.router = gate(
            config.router, hidden_size, config.num_experts, config.num_chosen, std=std, rngs=rngs
        )
        self.experts = Experts(config, hidden_size, std=std, rngs=rngs)
        self.shared = (
            SwiGlu(hidden_size, config.num_shared * config.intermediate_size, std=std, rngs=rngs)
            if config.num_shared
            else None
        )

    def __call__(
        self, x_BTD: Float[Array, "B T D"], counted_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], MoeStats]:
        """The layer's output and its statistics over the `counted_BT` tokens (padding is not)."""
        tokens = sharding.spec("batch", "length", None)
        weights = jax.tree.map(sharding.compute_spec, self.experts, is_leaf=sharding.is_variable)
        routed = sharding.local(
            _routed,
            in_specs=(P(), weights, tokens, sharding.spec("batch", "length")),
            out_specs=(tokens, MoeStats(P(), sharding.spec("batch"), P())),
        )
        y_BTD, stats = routed(self.router, self.experts, x_BTD, counted_BT)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, stats


def _routed(router, experts: Experts, x_BTD, counted_BT):
    """The routed part on one device: its tokens, and its slice of the experts."""
    batch = x_BTD.shape[0]
    x_MD = rearrange(x_BTD, "b t d -> (b t) d")
    routing = router(x_MD)

    def in_rows(x):
        return rearrange(x, "(b t) ... -> b t ...", b=batch)

    # Routed before gathering: the gate runs once per token, its decision travels with the row.
    rows = sharding.varying((x_MD, routing.choice_MK, routing.weight_MK), "tensor")
    rows = _gathered(rows)
    experts = sharding.varying(experts, "data", "fsdp", "context")
    num_local = experts.down_proj.shape[0]
    first = jax.lax.axis_index("expert") * num_local if sharding.cut("expert") else 0
    y_MD, given = dispatch(*rows, experts, first_expert=first, num_experts=num_local)
    y_BTD = in_rows(_returned(y_MD))

    num_experts = routing.share_ME.shape[-1]
    load_BE = times_chosen(in_rows(routing.choice_MK), counted_BT, num_experts)
    balance_B = sequence_balance_loss(
        in_rows(routing.share_ME),
        in_rows(routing.wanted_MK),
        counted_BT,
        lambda x: sharding.summed(x, "context"),
    )
    load_E = sharding.summed(load_BE.sum(0), *sharding.TOKEN_AXES)
    return y_BTD, MoeStats(load_E, balance_B, _dropped(routing.choice_MK, given))


def _dropped(choice_MK, given):
    """Pairs of all devices less what their experts were given; `tensor` holds each pair once."""
    pairs = choice_MK.size * math.prod(map(sharding.axis_size, sharding.TOKEN_AXES))
    handled = sharding.summed(given, *sharding.AXES) // sharding.axis_size("tensor")
    return (pairs - handled).astype(jnp.float32)


def _gathered(rows):
    """Each device sees the tokens of all devices along `expert`."""
    if not sharding.cut("expert"):
        return rows
    return jax.tree.map(lambda x: jax.lax.all_gather(x, "expert", axis=0, tiled=True), rows)


def _returned(y_MD):
    """Partial sums over experts and over expert width, back to the device that owns the token."""
    y_MD = sharding.summed(y_MD, "tensor")
    if not sharding.cut("expert"):
        return y_MD
    return jax.lax.psum_scatter(y_MD, "expert", scatter_dimension=0, tiled=True)
