"""Mixture of experts: router, routed experts across the mesh, shared experts."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from dsjax import sharding
from dsjax.config import Moe
from dsjax.nn.balance import sequence_balance_loss, times_chosen
from dsjax.nn.dispatch import dispatch
from dsjax.nn.dispatch.parts import own_pairs, own_part, whole
from dsjax.nn.dispatch.rows import Group, Rows, fan_out
from dsjax.nn.mlp import SwiGlu
from dsjax.nn.precision import products
from dsjax.nn.router import GATES
from dsjax.params import normal


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
            rngs, (num, hidden_size, 2, width), ("experts", "expert_embed", None, None), std=std
        )
        self.down_proj = normal(
            rngs, (num, width, hidden_size), ("experts", None, "expert_embed"), std=std
        )

    def __call__(self, x_UD, size_E):
        by = products.value
        gate_UF, up_UF = jnp.split(by.grouped(x_UD, self.gate_up_proj[...], size_E), 2, axis=-1)
        return by.grouped(by.swiglu(gate_UF, up_UF), self.down_proj[...], size_E)


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
        residual = sharding.residual(x_BTD.shape[1])
        tokens = sharding.spec("batch", residual)
        weights = map(sharding.weights_held, (self.router, self.experts))
        routed = sharding.local(
            functools.partial(
                _routed, length_axes=sharding.RULES[residual], fan_out=self._fan_out()
            ),
            in_specs=(*weights, tokens, tokens),
            out_specs=(tokens, MoeStats(P(), sharding.spec("batch"), P())),
        )
        x_BTD = sharding.reshard(x_BTD, "batch", residual, None)
        counted_BT = sharding.reshard(counted_BT, "batch", residual)
        y_BTD, stats = routed(self.router, self.experts, x_BTD, counted_BT)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, stats

    def _fan_out(self) -> int:
        """See `fan_out`, for the devices that share these experts."""
        router = self.config.router
        return fan_out(
            num_experts=self.config.num_experts,
            num_chosen=self.config.num_chosen,
            num_groups=router.num_groups,
            kept_groups=router.kept_groups,
            size=math.prod(map(sharding.axis_size, sharding.RULES["experts"])),
        )


def _routed(router, experts: Experts, x_BTD, counted_BT, *, length_axes, fan_out: int):
    """The routed part on one device: its tokens, and its slice of the experts."""
    batch = x_BTD.shape[0]
    x_MD = rearrange(x_BTD, "b t d -> (b t) d")
    routing = router(x_MD)

    def in_rows(x):
        return rearrange(x, "(b t) ... -> b t ...", b=batch)

    num_experts = routing.share_ME.shape[-1]
    token_axes = (*sharding.BATCH_AXES, *length_axes)
    others = tuple(axis for axis in sharding.cut(*sharding.AXES) if axis not in token_axes)
    # Routed before it travels: the gate runs once per token, its decision goes with the row.
    rows = own_part(Rows(x_MD, routing.choice_MK, routing.weight_MK), others, num_experts)
    group = Group(
        axes=sharding.cut(*sharding.RULES["experts"]),
        num_local=experts.down_proj.shape[0],
        fan_out=fan_out,
    )
    elsewhere = (axis for axis in sharding.AXES if axis not in sharding.RULES["experts"])
    y_MD, given = dispatch(rows, sharding.varying(experts, *elsewhere), group)
    y_BTD = in_rows(whole(y_MD, others)[: x_MD.shape[0]])

    load_BE = times_chosen(in_rows(routing.choice_MK), counted_BT, num_experts)
    balance_B = sequence_balance_loss(
        in_rows(routing.share_ME),
        in_rows(routing.wanted_MK),
        counted_BT,
        lambda x: sharding.summed(x, *length_axes),
    )
    load_E = sharding.summed(load_BE.sum(0), *token_axes)
    dropped = sharding.summed(own_pairs(routing.choice_MK, others) - given, *sharding.AXES)
    return y_BTD, MoeStats(load_E, balance_B, dropped.astype(jnp.float32))
