"""Which axes of the mesh an array varies over, inside of `jax.shard_map`."""

import jax
from jax import Array, lax


def alike(*arrays: Array) -> list[Array]:
    """Lets all vary over the axes of the mesh that one varies over.

    The gradient of an array that did not vary is then summed over those axes, as it should be; and
    what a loop begins with is of the kind that it ends with.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def like(array: Array, result: Array) -> Array:
    """`result` of a GPU kernel, which varies where its operand does but is not known to."""
    return alike(array, result)[1]
