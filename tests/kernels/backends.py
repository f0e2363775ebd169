"""Runs one implementation of an operation here, where there is neither GPU nor TPU."""

import contextlib

import jax
import numpy as np

from pallas_kernels.chip import interpreted

BACKENDS = ("reference", "gpu", "tpu")
PRODUCTS = ("dequantize", *BACKENDS)


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
