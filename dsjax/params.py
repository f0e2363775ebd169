"""Weights: declared in one line with shape and logical axes, counted, cast."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax import sharding
from dsjax.block_scaled import BlockScaled


class FullPrecision(nnx.Param):
    """A weight that computes in FP32 whatever the run's precision is (the router's gate)."""


class RouterBias(nnx.Variable):
    """The selection bias of V3's router: moved by a rule after each step, never by a gradient."""


def normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """An FP32 weight drawn from N(0, std^2); `axes` name its dimensions for `dsjax.sharding`."""
    if len(shape) != len(axes):
        raise ValueError(f"{shape=} has {len(shape)} dimensions but {axes=} names {len(axes)}")
    return kind(std * jax.random.normal(rngs.params(), shape), axes=axes)


def upcast(x: jax.Array) -> jax.Array:
    """At least FP32: what norms, softmax, scores and losses compute in (FP64 stays FP64)."""
    return x.astype(np.promote_types(x.dtype, jnp.float32))


def cast(module, dtype: jnp.dtype | None):
    """The module with its weights in the compute `dtype`; FP32-only weights and biases stay.

    So do weights that are kept in FP8: who multiplies knows what to do. `dtype=None` leaves all as
    they are.
    """
    if dtype is None:
        return module

    def one(variable: nnx.Variable):
        kept = isinstance(variable.get_value(), BlockScaled)
        if kept or isinstance(variable, FullPrecision | RouterBias):
            return variable
        return variable.replace(variable.get_value().astype(dtype))

    return jax.tree.map(one, module, is_leaf=sharding.is_variable)


def count(module, kind: type[nnx.Variable] = nnx.Variable) -> int:
    """How many numbers the variables of type `kind` hold."""
    variables = jax.tree.leaves(module, is_leaf=sharding.is_variable)
    return sum(v.get_value().size for v in variables if isinstance(v, kind))
