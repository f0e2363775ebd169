"""Schedules, AdamW, and the rule that moves the router bias."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from dsjax import sharding
from dsjax.params import RouterBias
from dsjax.run import LearningRate, Optim, Piecewise, StepDecay

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def piecewise(value: Piecewise, steps: int) -> Schedule:
    """`value` over a run of `steps`; a jump at fraction f happens at step ceil(f * steps)."""
    starts = np.array([math.ceil(start * steps) for start, _ in value.steps], np.int32)
    values = np.array([level for _, level in value.steps], np.float32)
    return lambda step: jnp.asarray(values)[jnp.sum(step >= starts) - 1]


def learning_rate(config: LearningRate | StepDecay, steps: int) -> Schedule:
    """The rate of each step of a run of `steps`."""
    schedule = SCHEDULES[type(config)](config, steps)
    # optax divides the step by a float; what counts as an int32 there is a promotion.
    return lambda step: schedule(step.astype(jnp.float32))


def _cosine_and_tails(config: LearningRate, steps: int) -> Schedule:
    """Warm-up, constant, cosine, two constant tails (V3 report section 4.2)."""
    peak, warmup = config.peak, config.warmup_steps
    constant, cosine, tail = (
        max(math.ceil(fraction * steps), warmup)
        for fraction in (config.constant_until, config.cosine_until, config.tail_until)
    )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, max(cosine - constant, 1), alpha=config.final),
            optax.constant_schedule(peak * config.final),
            optax.constant_schedule(peak * config.last),
        ],
        [warmup, constant, cosine, tail],
    )


def _step_decay(config: StepDecay, steps: int) -> Schedule:
    """Warm-up, constant, cut at each fraction of the run (V2 report section 3.1.2)."""
    warmup, factor = config.warmup_steps, config.factor
    cuts = [max(math.ceil(fraction * steps), warmup) for fraction in config.at]
    levels = [config.peak * factor**number for number in range(len(cuts) + 1)]
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.peak, warmup),
            *(optax.constant_schedule(level) for level in levels),
        ],
        [warmup, *cuts],
    )


SCHEDULES = {LearningRate: _cosine_and_tails, StepDecay: _step_decay}


def stored_in(
    dtype: jnp.dtype, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`inner` with the floats of its state kept in `dtype`, widened to FP32 for each update."""

    def floats(state, dtype):
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def update(updates, state, params=None):
        updates, state = inner.update(updates, floats(state, jnp.float32), params)
        return updates, floats(state, dtype)

    return optax.GradientTransformation(lambda params: floats(inner.init(params), dtype), update)


def clipped(most: float) -> optax.GradientTransformation:
    """Gradients with a global norm above `most` are scaled down to it.

    `optax.clip_by_global_norm` divides every number, and XLA then stores all gradients once more:
    on CPU a twentieth of a small model's step. A factor is a part of what reads them.
    """

    def update(updates, state, params=None):
        factor = jnp.minimum(1, most / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(config: Optim, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay of matrices, learning rate."""

    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)

    def matrices(params):
        return jax.tree.map(
            lambda v: v.replace(len(v.axes) > 1), params, is_leaf=sharding.is_variable
        )

    return optax.chain(
        clipped(config.clip_norm),
        adam if config.moments == "fp32" else stored_in(jnp.dtype("bfloat16"), adam),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(learning_rate(config.learning_rate, steps)),
    )


def moved_bias(
    bias_LE: Float[Array, "*L E"], load_LE: Float[Array, "*L E"], rate: Float[Array, ""]
) -> Float[Array, "*L E"]:
    """b_e + rate * sign(mean load - load_e): towards equal load (V3 report section 2.1.2).

    The bias decides which experts are chosen, never how much they count.
    """
    return bias_LE + rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)


def move_router_biases(
    biases: PyTree, loads: Sequence[Float[Array, "..."]], rate: Float[Array, ""]
) -> PyTree:
    """All router biases moved; `loads` in the model's order: layer groups, then MTP modules."""
    variables, structure = jax.tree.flatten(biases, is_leaf=lambda v: isinstance(v, RouterBias))
    moved = [
        variable.replace(moved_bias(variable.get_value(), load, rate))
        for variable, load in zip(variables, loads, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)
