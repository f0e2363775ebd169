"""Runs one implementation of an operation here, where there is neither GPU nor TPU."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.chip import interpreted
from tests.tolerance import TOLERANCE

BACKENDS = ("reference", "gpu", "tpu")
PRODUCTS = ("dequantize", "dequantize_bf16", *BACKENDS)


def tolerance(backend: str, dtype: DTypeLike = jnp.float32) -> float:
    """Of a product's result; two factors that are rounded to BF16 are off by 2**-9 each at most."""
    bound = TOLERANCE["f32" if jnp.dtype(dtype) == jnp.float32 else "bf16"]
    return bound + 2 * 2.0**-9 * (backend == "dequantize_bf16")


def on(backend: str) -> contextlib.AbstractContextManager:
    """The interpreter, looking for races, for a backend that needs one."""
    return interpreted(backend) if backend in ("gpu", "tpu") else contextlib.nullcontext()


def run(backend: str | None, function, *arguments, **options):
    """function(*arguments, implementation=backend, **options) compiled, as NumPy arrays."""

    def call(*arguments):
        return function(*arguments, implementation=backend, **options)

    with on(backend):
        # The interpreter calls back into Python: read the results before its context ends.
        return jax.tree.map(np.asarray, jax.jit(call)(*arguments))


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal to the bit, all NaNs alike."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise AssertionError(f"{found.dtype}{found.shape} != {expected.dtype}{expected.shape}")
    whole = f"u{found.dtype.itemsize}"
    same = found.view(whole) == expected.view(whole)
    nan = np.isnan(found.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    return bool((same | nan).all())
