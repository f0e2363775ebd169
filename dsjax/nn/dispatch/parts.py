"""Rows that several devices hold alike, as in decoding, where a token cannot be cut: shared out.

In all functions `axes` are the axes of the mesh along which the rows are the same; with none, rows
pass as they are.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax import sharding
from dsjax.nn.dispatch.rows import Rows


def own_part(rows: Rows, axes: tuple[str, ...], num_experts: int) -> Rows:
    """This device's part of `rows`, filled up with rows for no expert."""
    if not axes:
        return rows
    each, rank = _part(rows.x_MD.shape[0], axes)
    missing = each * math.prod(map(sharding.axis_size, axes)) - rows.x_MD.shape[0]

    def own(x, fill):
        x = jnp.pad(x, ((0, missing), (0, 0)), constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(sharding.varying(x, *axes), rank * each, each)

    return jax.tree.map(own, rows, Rows(0, num_experts, 0))


def own_pairs(choice_MK: Int[Array, "M K"], axes: tuple[str, ...]) -> Int[Array, ""]:
    """How many pairs of token and expert this device's part holds."""
    num_rows, num_chosen = choice_MK.shape
    if not axes:
        return jnp.int32(num_rows * num_chosen)
    each, rank = _part(num_rows, axes)
    return jnp.clip(num_rows - rank * each, 0, each) * num_chosen


def _part(num_rows: int, axes: tuple[str, ...]):
    """Rows of each part, and the number of this device's."""
    parts = math.prod(map(sharding.axis_size, axes))
    return -(-num_rows // parts), jax.lax.axis_index(axes)


def whole(y_MD: Float[Array, "M D"], axes: tuple[str, ...]) -> Float[Array, "all D"]:
    """The parts of all devices along `axes`, on each of them."""
    if not axes:
        return y_MD
    return jax.lax.all_gather(y_MD, axes, axis=0, tiled=True, to="invarying")
