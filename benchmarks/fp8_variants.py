"""What DeepSeek's FP8 recipe is measured against: it with parts taken away, emulated anywhere."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsjax.nn.block_fp8 import parts
from dsjax.nn.precision import Exact
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantize import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)

LARGEST = 448.0
# Products that Hopper's tensor cores add at once, and the bits their sums keep (V3 report 3.3).
ADDED, KEPT_BITS = 32, 14


def per_tensor(x: Array) -> Array:
    """Through e4m3 and back with one scale for all numbers."""
    scale = jnp.maximum(jnp.abs(x).max().astype(jnp.float32), 1e-4) / LARGEST
    values = (x.astype(jnp.float32) / scale).astype(jnp.float8_e4m3fn)
    return (values.astype(jnp.float32) * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(product: Callable, x: Array, w: Array) -> Array:
    return product(per_tensor(x), per_tensor(w))


def _rounded_backward(product, saved, dy):
    return jax.vjp(product, *saved)[1](per_tensor(dy))


_rounded.defvjp(
    lambda product, x, w: (_rounded(product, x, w), (per_tensor(x), per_tensor(w))),
    _rounded_backward,
)


@dataclass(frozen=True)
class PerTensor(Exact):
    """One scale for all of an activation, a weight, a gradient; all experts' weights are one."""

    def einsum(self, subscripts, x, w, *, axes=None):
        return _rounded(lambda x, w: jnp.einsum(subscripts, x, w), x, w)

    def grouped(self, x_UD, w_EDX, size_E):
        w_EDX = w_EDX.reshape(*w_EDX.shape[:2], -1)
        # Not closed over: the sizes are traced.
        return _rounded_groups(x_UD, w_EDX, size_E)


@jax.custom_vjp
def _rounded_groups(x, w, sizes):
    return grouped_matmul(per_tensor(x), per_tensor(w), sizes)


def _groups_backward(saved, dy):
    x, w, sizes = saved
    _, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return *pull(per_tensor(dy)), None


_rounded_groups.defvjp(
    lambda x, w, sizes: (_rounded_groups(x, w, sizes), (per_tensor(x), per_tensor(w), sizes)),
    _groups_backward,
)


def _cut(x: Array) -> Array:
    """FP32 with the lowest bits of its 24 dropped, as the accumulator drops them."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mask = np.uint32(0xFFFFFFFF << (24 - KEPT_BITS) & 0xFFFFFFFF)
    return jax.lax.bitcast_convert_type(bits & mask, jnp.float32)


def _short_sum(term: Callable[[int], Array], size: int) -> Array:
    """term(0) + term(32) + ... in an accumulator of 14 bits that nothing is promoted from."""
    starts = jnp.arange(ADDED, size, ADDED, dtype=jnp.int32)
    first = _cut(term(0))
    return jax.lax.scan(lambda y, at: (_cut(y + term(at)), None), first, starts)[0]


def _short_matmul(x_MK: Array, w_NK: Array) -> Array:
    missing = (0, 0), (0, -x_MK.shape[1] % ADDED)
    x_MK, w_NK = jnp.pad(x_MK, missing), jnp.pad(w_NK, missing)

    def term(at):
        x, w = (jax.lax.dynamic_slice_in_dim(one, at, ADDED, axis=1) for one in (x_MK, w_NK))
        return x @ w.T

    return _short_sum(term, x_MK.shape[1])


def _rows(x: Array) -> Array:
    return dequantize_rows(*quantize_rows(x))


def _blocks(w: Array) -> Array:
    return dequantize_blocks(*quantize_blocks(w))


@jax.custom_vjp
def _short_linear(x_MK: Array, w_NK: Array) -> Array:
    return _short_matmul(_rows(x_MK), _blocks(w_NK)).astype(x_MK.dtype)


def _short_linear_backward(saved, dy):
    x, w = saved
    dx = _short_matmul(_rows(dy), _blocks(w).T)
    dw = _short_matmul(_rows(dy.T), _rows(x.T))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_short_linear.defvjp(lambda x, w: (_short_linear(x, w), (x, w)), _short_linear_backward)


def _short_groups_of(x_MK: Array, w_GKN: Array, sizes: Array) -> Array:
    missing = -x_MK.shape[1] % ADDED
    x_MK = jnp.pad(x_MK, ((0, 0), (0, missing)))
    w_GKN = jnp.pad(w_GKN, ((0, 0), (0, missing), (0, 0)))

    def term(at):
        x = jax.lax.dynamic_slice_in_dim(x_MK, at, ADDED, axis=1)
        w = jax.lax.dynamic_slice_in_dim(w_GKN, at, ADDED, axis=1)
        return grouped_matmul(x, w, sizes)

    return _short_sum(term, x_MK.shape[1])


@jax.custom_vjp
def _short_grouped(x, w, sizes):
    return _short_groups_of(_rows(x), jax.vmap(_blocks)(w), sizes).astype(x.dtype)


def _short_grouped_backward(saved, dy):
    x, w, sizes = saved
    wide_dy = _rows(dy)
    dx = _short_groups_of(wide_dy, jax.vmap(_blocks)(w).swapaxes(1, 2), sizes)
    _, pull = jax.vjp(lambda w: grouped_matmul(_rows(x), w, sizes), jnp.zeros_like(w, jnp.float32))
    return dx.astype(x.dtype), pull(wide_dy)[0].astype(w.dtype), None


_short_grouped.defvjp(
    lambda x, w, sizes: (_short_grouped(x, w, sizes), (x, w, sizes)), _short_grouped_backward
)


@dataclass(frozen=True)
class Unpromoted(Exact):
    """DeepSeek's scales, and sums that stay in the tensor cores' 14 bits from end to end.

    Only the experts' weight gradients are summed in FP32.
    """

    def einsum(self, subscripts, x, w, *, axes=None):
        rows, inner = parts(subscripts)
        x_MK = x.reshape(math.prod(x.shape[:rows]), -1)
        y_MN = _short_linear(x_MK, w.reshape(x_MK.shape[1], -1).T)
        return y_MN.reshape(*x.shape[:rows], *w.shape[inner:])

    def grouped(self, x_UD, w_EDX, size_E):
        return _short_grouped(x_UD, w_EDX.reshape(*w_EDX.shape[:2], -1), size_E)
