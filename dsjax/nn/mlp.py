"""SwiGLU feed-forward layer, dense or shared expert."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax import sharding
from dsjax.nn.precision import products
from dsjax.params import normal


class SwiGlu(nnx.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, hidden_size: int, width: int, *, std: float, rngs: nnx.Rngs):
        self.gate_up_proj = normal(rngs, (hidden_size, 2, width), ("embed", None, "ffn"), std=std)
        self.down_proj = normal(rngs, (width, hidden_size), ("ffn", "embed"), std=std)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        residual = sharding.residual(x_BTD.shape[1])
        x_BTD = sharding.reshard(x_BTD, "batch", "length", None)
        pair_BTPF = products.value.einsum("BTD,DPF->BTPF", x_BTD, self.gate_up_proj[...])
        # Split and not sliced: backward joins the gradients, where slices' are padded and added.
        gate_BTF, up_BTF = (x.squeeze(2) for x in jnp.split(pair_BTPF, 2, axis=2))
        hidden_BTF = products.value.swiglu(gate_BTF, up_BTF)
        return products.value.einsum(
            "BTF,FD->BTD", hidden_BTF, self.down_proj[...], axes=("batch", residual, None)
        )
