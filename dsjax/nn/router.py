"""Which experts a token goes to, with what weight. Scores in FP32; ties: the lower index."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import SigmoidRouter, SoftmaxRouter
from dsjax.params import FullPrecision, RouterBias, normal, upcast


class Routing(NamedTuple):
    """The decision for M tokens.

    `share_ME` (sums to 1 over E) and `wanted_MK` (the best experts by plain score) are what the
    sequence-wise balance loss looks at.
    """

    choice_MK: Int[Array, "M K"]
    weight_MK: Float[Array, "M K"]
    share_ME: Float[Array, "M E"]
    wanted_MK: Int[Array, "M K"]


def _scores(x_MD: Float[Array, "M D"], gate_proj: nnx.Param) -> Float[Array, "M E"]:
    """Gate logits, multiplied in FP32: in BF16 the chosen experts flip."""
    wide = upcast(x_MD)
    gate_DE = gate_proj[...].astype(wide.dtype)
    return jnp.einsum("MD,DE->ME", wide, gate_DE, precision=jax.lax.Precision.HIGHEST)


def _keep_best_groups(
    score_ME: Float[Array, "M E"], *, num_groups: int, kept: int, group_best: int
) -> Float[Array, "M E"]:
    """-inf outside the `kept` groups whose `group_best` best experts add up to the most."""
    if kept == num_groups:
        return score_ME
    grouped_MGe = rearrange(score_ME, "m (g e) -> m g e", g=num_groups)
    group_score_MG = jax.lax.top_k(grouped_MGe, group_best)[0].sum(-1)
    best_Mk = jax.lax.top_k(group_score_MG, kept)[1]
    kept_MG = (best_Mk[:, :, None] == jnp.arange(num_groups, dtype=jnp.int32)[None, None]).any(1)
    return rearrange(jnp.where(kept_MG[:, :, None], grouped_MGe, -jnp.inf), "m g e -> m (g e)")


def _weights(score_ME, choice_MK, *, normalize: bool, scale: float) -> Float[Array, "M K"]:
    # Not by index: the gradient of that is a scatter, which TPU's compiler turns into a sort.
    expert_E = jnp.arange(score_ME.shape[-1], dtype=jnp.int32)
    chosen_MKE = choice_MK[..., None] == expert_E[None, None]
    weight_MK = jnp.where(chosen_MKE, score_ME[:, None], 0).sum(-1)
    if normalize:
        weight_MK = weight_MK / (weight_MK.sum(-1, keepdims=True) + 1e-20)
    return weight_MK * scale


class SoftmaxGate(nnx.Module):
    """V2 (report section 2.2.2): softmax scores; a group counts as its best expert."""

    def __init__(
        self,
        config: SoftmaxRouter,
        hidden_size: int,
        num_experts: int,
        num_chosen: int,
        *,
        std,
        rngs,
    ):
        self.config, self.num_chosen = config, num_chosen
        self.gate_proj = normal(
            rngs, (hidden_size, num_experts), ("embed", None), std=std, kind=FullPrecision
        )

    def __call__(self, x_MD: Float[Array, "M D"]) -> Routing:
        score_ME = jax.nn.softmax(_scores(x_MD, self.gate_proj), axis=-1)
        candidates_ME = _keep_best_groups(
            score_ME, num_groups=self.config.num_groups, kept=self.config.kept_groups, group_best=1
        )
        choice_MK = jax.lax.top_k(candidates_ME, self.num_chosen)[1]
        weight_MK = _weights(
            score_ME, choice_MK, normalize=self.config.normalize, scale=self.config.scale
        )
        return Routing(choice_MK, weight_MK, score_ME, choice_MK)


class SigmoidGate(nnx.Module):
    """V3 (report section 2.1.2, eqs. 12-16): sigmoid scores, selection by score + bias.

    The bias picks and never weighs; a group counts as the sum of its two best biased scores.
    """

    def __init__(
        self,
        config: SigmoidRouter,
        hidden_size: int,
        num_experts: int,
        num_chosen: int,
        *,
        std,
        rngs,
    ):
        self.config, self.num_chosen = config, num_chosen
        self.gate_proj = normal(
            rngs, (hidden_size, num_experts), ("embed", None), std=std, kind=FullPrecision
        )
        self.bias = RouterBias(jnp.zeros((num_experts,)), axes=(None,))

    def __call__(self, x_MD: Float[Array, "M D"]) -> Routing:
        score_ME = jax.nn.sigmoid(_scores(x_MD, self.gate_proj))
        bias_E = jax.lax.stop_gradient(self.bias[...]).astype(score_ME.dtype)
        candidates_ME = _keep_best_groups(
            score_ME + bias_E[None],
            num_groups=self.config.num_groups,
            kept=self.config.kept_groups,
            group_best=2,
        )
        choice_MK = jax.lax.top_k(candidates_ME, self.num_chosen)[1]
        weight_MK = _weights(
            score_ME, choice_MK, normalize=self.config.normalize, scale=self.config.scale
        )
        share_ME = score_ME / score_ME.sum(-1, keepdims=True)
        wanted_MK = jax.lax.top_k(score_ME, self.num_chosen)[1]
        return Routing(choice_MK, weight_MK, share_ME, wanted_MK)


GATES = {SoftmaxRouter: SoftmaxGate, SigmoidRouter: SigmoidGate}
