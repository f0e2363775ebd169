"""How the layers multiply, by the name a run gives it: exactly, or in block FP8."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax import sharding
from dsjax.block_scaled import BlockScaled, whole
from dsjax.nn.block_fp8 import BlockFp8
from pallas_kernels.grouped_matmul import grouped_matmul


@runtime_checkable
class Products(Protocol):
    """What a layer leaves to the run; values, so that jit can tell them apart."""

    def einsum(
        self,
        subscripts: str,
        x: Array,
        w: Array | BlockScaled,
        *,
        axes: Sequence[str | None] | None = None,
    ) -> Array:
        """A linear layer: `x` [rows..., inner...] by `w` [inner..., features...].

        The result [rows..., features...] is laid out by the logical `axes`, by default as rows and
        features lie.
        """

    def swiglu(self, gate: Float[Array, "*M F"], up: Float[Array, "*M F"]) -> Float[Array, "*M F"]:
        """silu(gate) * up."""

    def grouped(
        self, x_UD: Float[Array, "U D"], w_EDX: Array | BlockScaled, size_E: Int[Array, " E"]
    ) -> Float[Array, "U X"]:
        """`x_UD`, sorted by expert, by the matrix of each row's expert; inside of `shard_map`.

        `w_EDX` is [E, D, F], or [E, D, 2, F] for two matrices whose results stand side by side.
        """

    def sent(self, move: Callable, back: Callable, x: Array, *how: Any) -> Array:
        """move(x, *how): rows of `x` on their way to experts. `back` is the transpose of `move`."""

    def returned(self, move: Callable, back: Callable, y: Array, *how: Any) -> Array:
        """move(y, *how): the experts' sums on their way back."""


@dataclass(frozen=True)
class Exact:
    """In the dtype of what comes in."""

    def einsum(self, subscripts, x, w, *, axes=None):
        w = whole(w, x.dtype)
        return (
            jnp.einsum(subscripts, x, w)
            if axes is None
            else sharding.einsum(subscripts, x, w, axes=axes)
        )

    def swiglu(self, gate, up):
        return jax.nn.silu(gate) * up

    def grouped(self, x_UD, w_EDX, size_E):
        w_EDX = whole(w_EDX, x_UD.dtype)
        return grouped_matmul(x_UD, w_EDX.reshape(*w_EDX.shape[:2], -1), size_E)

    def sent(self, move, back, x, *how):
        return move(x, *how)

    def returned(self, move, back, y, *how):
        return move(y, *how)


# `with products(BlockFp8()):` around the code that is traced; part of the key of jit's caches.
products = jax.make_user_context(Exact())


@dataclass(frozen=True)
class Precision:
    """`dtype`: what weights are cast to when their layer's turn comes, and so of activations."""

    dtype: jnp.dtype
    products: Products

    def applied(self, function: Callable) -> Callable:
        """`function`, which when it is traced multiplies by `products`."""

        @functools.wraps(function)
        def traced(*args):
            with products(self.products):
                return function(*args)

        return traced


BF16 = jnp.dtype("bfloat16")

# "fp8": the scales of DeepSeek-V3, any FP32 number. "fp8_exact_wgrad": with weights' gradients of
# BF16, summed in FP32. "fp8_ue8m0": the scales of V3.1, powers of two.
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(jnp.dtype("float32"), Exact()),
    "bf16": Precision(BF16, Exact()),
    "fp8": Precision(BF16, BlockFp8()),
    "fp8_exact_wgrad": Precision(BF16, BlockFp8(weight_grad="exact")),
    "fp8_ue8m0": Precision(BF16, BlockFp8(power_of_two=True)),
}
