"""Rows to experts and back, on one device's piece of the tokens; no token is ever dropped."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def _copies(x_MD, order, inverse, num_chosen):
    """Row r of the result is the token that sorted row r came from: x[order // K]."""
    return x_MD[order // num_chosen]


def _copies_fwd(x_MD, order, inverse, num_chosen):
    return _copies(x_MD, order, inverse, num_chosen), (inverse, x_MD.shape)


def _copies_bwd(saved, grad):
    # Un-sorting and adding the K copies is a gather; autodiff would emit a slow scatter-add.
    inverse, (num_tokens, dim) = saved
    return grad[inverse].reshape(num_tokens, -1, dim).sum(1), None, None, None


_copies.defvjp(_copies_fwd, _copies_bwd)


@jax.custom_vjp
def _permuted(x, order, inverse):
    """x[order], for a permutation whose inverse is at hand."""
    return x[order]


_permuted.defvjp(
    lambda x, order, inverse: (x[order], inverse), lambda inverse, grad: (grad[inverse], None, None)
)


def dispatch(
    x_MD: Float[Array, "M D"],
    choice_MK: Int[Array, "M K"],
    weight_MK: Float[Array, "M K"],
    experts: Callable[[Float[Array, "R D"], Int[Array, " E"]], Float[Array, "R D"]],
    *,
    first_expert: int | Int[Array, ""],
    num_experts: int,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """sum_k weight_k * expert_k(x), over the experts [first_expert, first_expert + num_experts).

    `experts(rows, sizes)` gets the chosen rows sorted by expert and each expert's row count. Rows
    for experts that live elsewhere are sorted behind and come back as zeros. The second result is
    the number of rows that the experts were given.
    """
    num_chosen = choice_MK.shape[1]
    local = (choice_MK - first_expert).reshape(-1)
    local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
    order = jnp.argsort(local, stable=True)
    inverse = jnp.argsort(order)
    sizes_E = (local[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None]).sum(
        0, dtype=jnp.int32
    )
    rows = _copies(x_MD, order, inverse, num_chosen)
    out_MKD = _permuted(experts(rows, sizes_E), inverse, order).reshape(*choice_MK.shape, -1)
    y_MD = jnp.einsum("MKD,MK->MD", out_MKD, weight_MK.astype(x_MD.dtype))
    return y_MD, sizes_E.sum(dtype=jnp.int32)
