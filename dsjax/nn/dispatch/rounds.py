"""Room for an even load, and further rounds for what exceeds it: shapes stay static, nothing drops.

Routing is even up to a little noise when training goes well, and never by guarantee. Buffers for
the worst case would be as large as the whole group's tokens; so a buffer has room for the even
share and some more, and a loop with a dynamic number of turns takes the rest.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsjax import sharding

ROOM = 1.25
# Rows that TPU multiplies at once in its ragged product, if they divide into such; else eight.
TILE = 128


def room(even_share: float | int, *, most: int) -> int:
    """Rows that a buffer has room for, at most `most`.

    A quarter more than the even share, and four standard deviations of a share that is drawn by
    chance, which is what counts when there are few rows (decoding).
    """
    wanted = ROOM * even_share + 4 * math.sqrt(even_share)
    unit = TILE if wanted >= 16 * TILE else 8
    return min(most, unit * math.ceil(wanted / unit))


def over_rounds(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    floats: tuple,
    ints: Any,
    num_rounds: Int[Array, ""],
    *,
    most: int,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """The sum of step(r, floats, ints) over the rounds r < `num_rounds` <= `most`, which is static.

    `step` gives rows shaped like floats[0], differentiable in `floats`, and a count. It must not
    close over traced values. Where there may be more than one round, all are computed again in
    backward: memory is that of one, and there is one program for all of them. (Where layers are
    recomputed anyway that costs nothing: nothing needs what the layer's own forward gives again.)
    """
    if most == 1:
        return step(jnp.int32(0), floats, ints)
    return _sum(step, floats, ints, num_rounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(step, floats, ints, num_rounds):
    nothing = jnp.zeros_like(floats[0]), sharding.varying(jnp.int32(0), *sharding.AXES)
    return _added(num_rounds, lambda index: step(index, floats, ints), nothing)


def _added(num_rounds, step, total):
    """total + step(0) + ... + step(num_rounds - 1)."""
    return lax.fori_loop(
        0, num_rounds, lambda index, total: jax.tree.map(jnp.add, total, step(index)), total
    )


def _forward(step, floats, ints, num_rounds):
    return _sum(step, floats, ints, num_rounds), (floats, ints, num_rounds)


def _backward(step, saved, grads):
    floats, ints, num_rounds = saved

    def pulled(index):
        _, pull, _ = jax.vjp(lambda floats: step(index, floats, ints), floats, has_aux=True)
        return pull(grads[0])[0]

    return _added(num_rounds, pulled, jax.tree.map(jnp.zeros_like, floats)), None, None


_sum.defvjp(_forward, _backward)
