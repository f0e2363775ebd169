"""What every public operation asks of its operands before an implementation sees them."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

# What an operand may hold.
E4M3 = (jnp.float8_e4m3fn,)
SCALES = (jnp.float32,)
NUMBERS = (jnp.bfloat16, jnp.float32)
FLOATS = (jnp.floating,)
# Not narrower: sizes are added up.
COUNTS = (jnp.int32, jnp.int64)

RESULTS = (jnp.bfloat16, jnp.float32)


def check(
    op: str, *, out_dtype: DTypeLike = jnp.float32, **operands: tuple[Array, int, tuple]
) -> None:
    """ValueError unless each operand has its number of dimensions and one of its dtypes."""
    for name, (array, ndim, kinds) in operands.items():
        if array.ndim != ndim or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"{op} wants {name} of {wanted} with {ndim} dimensions, got "
                f"{array.dtype}{array.shape}; cast or reshape it"
            )
    if jnp.dtype(out_dtype) not in map(jnp.dtype, RESULTS):
        raise ValueError(
            f"{op} wants an out_dtype of bfloat16 or float32, got {jnp.dtype(out_dtype)}; cast "
            "what comes out"
        )


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """For factors of `dtype`: FP32 as it is, on platforms too that would round it by default."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
