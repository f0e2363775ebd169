"""The definition: 128 products at a time, their sum scaled and added in FP32."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.quantize.shapes import BLOCK, num_blocks


def matmul(
    x_MK: Array, x_scales: Array, w_NK: Array, w_scales: Array, *, out_dtype: DTypeLike
) -> Array:
    """See `fp8_matmul`."""
    (M, across), N = x_scales.shape, w_NK.shape[0]
    if w_scales.shape[0] != N:
        w_scales = jnp.repeat(w_scales, BLOCK, axis=0)[:N]
    # BF16 holds every number of e4m3, so its products are exact on all platforms.
    x_BMK, w_BNK = (_blocks(values).astype(jnp.bfloat16) for values in (x_MK, w_NK))

    if not across:
        return jnp.zeros((M, N), out_dtype)

    def term(x_MK, x_scale_M, w_NK, w_scale_N):
        part_MN = lax.dot_general(
            x_MK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return part_MN * (x_scale_M[:, None] * w_scale_N[None])

    blocks = x_BMK, x_scales.T, w_BNK, w_scales.T
    # Not from zeros: inside of `jax.shard_map` those would be of another kind than the terms.
    y_MN = term(*(one[0] for one in blocks))
    y_MN, _ = lax.scan(
        lambda y_MN, block: (y_MN + term(*block), None), y_MN, tuple(one[1:] for one in blocks)
    )
    return y_MN.astype(out_dtype)


def _blocks(values: Array) -> Array:
    """[rows, K] as [ceil(K/128), rows, 128]."""
    rows, size = values.shape
    values = jnp.pad(values, ((0, 0), (0, -size % BLOCK)))
    return values.reshape(rows, num_blocks(size), BLOCK).transpose(1, 0, 2)
