"""A product of groups whose gradients are products of groups."""

from collections.abc import Callable

import jax
from jax import Array

from pallas_kernels.varying import alike


def differentiable(product: Callable, wgrad: Callable) -> Callable:
    """y = x w by `product(x, w, sizes, contract=0)`, differentiable in x and w.

    dx = dy w^T is `product(dy, w, sizes, contract=1)`, dw = x^T dy `wgrad(x, dy, sizes, dtype)`.
    """

    @jax.custom_vjp
    def multiply(x, w, sizes_G):
        return product(x, w, sizes_G, contract=0)

    def forward(x, w, sizes_G):
        return multiply(x, w, sizes_G), (x, w, sizes_G)

    def backward(saved, dy):
        x, w, sizes_G = saved
        return product(dy, w, sizes_G, contract=1), wgrad(x, dy, sizes_G, w.dtype), None

    multiply.defvjp(forward, backward)

    def matmul(x: Array, w: Array, sizes_G: Array) -> Array:
        return multiply(*alike(x, w, sizes_G))

    return matmul
