"""Multi-head latent attention: expanded for training and prefill, absorbed for decode.

One parameter set. Per token and layer the cache holds the normed latent (C numbers) and the rotated
key shared by all heads (R numbers); expanded keys and values are never stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax import sharding
from dsjax.block_scaled import BlockScaled, whole
from dsjax.config import Mla
from dsjax.nn import masks, rope
from dsjax.nn.attend import attend
from dsjax.nn.causal import causal
from dsjax.nn.masks import Places
from dsjax.nn.norm import RMSNorm
from dsjax.nn.precision import products
from dsjax.nn.remat import LATENTS
from dsjax.params import normal


class LatentCache(NamedTuple):
    """What L layers remember of S tokens; slot s belongs to position s."""

    latent_LBSC: Float[Array, "L B S C"]
    rope_LBSR: Float[Array, "L B S R"]


class DirectQuery(nnx.Module):
    """Queries straight from the hidden state (V2-Lite): W_Q x."""

    def __init__(self, config: Mla, hidden_size: int, *, std: float, eps: float, rngs: nnx.Rngs):
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.q_proj = normal(
            rngs, (hidden_size, config.num_heads, head_dim), ("embed", "heads", None), std=std
        )

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T N HR"]:
        x_BTD = sharding.reshard(x_BTD, "batch", "length", None)
        return products.value.einsum("BTD,DNX->BTNX", x_BTD, self.q_proj[...])


class LatentQuery(nnx.Module):
    """Queries through a normed latent of rank Q: W_UQ RMSNorm(W_DQ x)."""

    def __init__(self, config: Mla, hidden_size: int, *, std: float, eps: float, rngs: nnx.Rngs):
        rank, head_dim = config.q_lora_rank, config.qk_nope_head_dim + config.qk_rope_head_dim
        self.q_a_proj = normal(rngs, (hidden_size, rank), ("embed", None), std=std)
        self.q_a_norm = RMSNorm(rank, eps=eps)
        self.q_b_proj = normal(
            rngs, (rank, config.num_heads, head_dim), ("embed", "heads", None), std=std
        )

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T N HR"]:
        latent_BTQ = products.value.einsum("BTD,DQ->BTQ", x_BTD, self.q_a_proj[...])
        latent_BTQ = self.q_a_norm(latent_BTQ)
        # Every head needs every token, and this is the narrowest that a token gets.
        latent_BTQ = sharding.reshard(latent_BTQ, "batch", "length", None)
        latent_BTQ = checkpoint_name(latent_BTQ, LATENTS)
        return products.value.einsum("BTQ,QNX->BTNX", latent_BTQ, self.q_b_proj[...])


class MlaAttention(nnx.Module):
    """DeepSeek-V2 eqs. 37-47; softmax scale (H + R)^-0.5 m^2 with YaRN's m."""

    def __init__(self, config: Mla, hidden_size: int, *, std: float, eps: float, rngs: nnx.Rngs):
        heads, rank = config.num_heads, config.kv_lora_rank
        nope, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.config = config
        query = DirectQuery if config.q_lora_rank is None else LatentQuery
        self.query = query(config, hidden_size, std=std, eps=eps, rngs=rngs)
        self.kv_a_proj = normal(rngs, (hidden_size, rank + rotary), ("embed", None), std=std)
        self.kv_a_norm = RMSNorm(rank, eps=eps)
        self.kv_b_proj = normal(
            rngs, (rank, heads, nope + value), ("embed", "heads", None), std=std
        )
        self.o_proj = normal(rngs, (heads, value, hidden_size), ("heads", None, "embed"), std=std)

    @property
    def scale(self) -> float:
        """The factor on the scores."""
        head_dim = self.config.qk_nope_head_dim + self.config.qk_rope_head_dim
        return head_dim**-0.5 * rope.softmax_factor(self.config.rope)

    def init_cache(
        self, batch: int, num_slots: int, dtype: jnp.dtype, *, layers: int = 1
    ) -> LatentCache:
        """An empty cache of `num_slots` tokens per row, for `layers` alike."""
        widths = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        empty = (jnp.zeros((layers, batch, num_slots, width), dtype) for width in widths)
        return LatentCache(*(sharding.reshard(x, None, "batch", None, None) for x in empty))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        places: Places,
        cache: LatentCache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        """Attention over the rows themselves, or over a cache that the tokens are first added to.

        With a cache, row b must hold consecutive positions; they are the slots written, of `layer`.
        """
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        q_nope_BTNH, q_rope_BTNR = jnp.split(self.query(x_BTD), [nope], axis=-1)
        q_rope_BTNR = rope.rotate(q_rope_BTNR, places.positions_BT, self.config.rope)

        joint_BTX = products.value.einsum("BTD,DX->BTX", x_BTD, self.kv_a_proj[...])
        joint_BTX = sharding.reshard(joint_BTX, "batch", "length", None)
        joint_BTX = checkpoint_name(joint_BTX, LATENTS)
        latent_BTC, rope_BTR = jnp.split(joint_BTX, [rank], axis=-1)
        latent_BTC = self.kv_a_norm(latent_BTC)
        rope_BT1R = rope.rotate(rope_BTR[:, :, None], places.positions_BT, self.config.rope)
        rope_BTR = rope_BT1R.squeeze(2)

        if cache is None:
            out_BTNW = causal(
                (q_nope_BTNH, q_rope_BTNR),
                (latent_BTC, rope_BTR),
                self.kv_b_proj[...],
                self._unfolded,
                places,
                scale=self.scale,
            )
        else:
            start_B = places.positions_BT[:, 0]
            pairs = zip(cache, (latent_BTC, rope_BTR), strict=True)
            cache = LatentCache(*(_written(*pair, start_B, layer) for pair in pairs))
            latent_BSC, rope_BSR = (x_LBSX[layer] for x_LBSX in cache)
            visibility = masks.over_cache(places, latent_BSC.shape[1])
            path = self.absorbed if self._absorbing_pays(x_BTD.shape[1]) else self.expanded
            out_BTNW = path(q_nope_BTNH, q_rope_BTNR, latent_BSC, rope_BSR, visibility)
        residual = sharding.residual(x_BTD.shape[1])
        y_BTD = products.value.einsum(
            "BTNW,NWD->BTD", out_BTNW, self.o_proj[...], axes=("batch", residual, None)
        )
        return y_BTD, cache

    def _absorbing_pays(self, num_queries: int) -> bool:
        """Whether reading T queries against latents costs less than expanding each latent once.

        Per head and cached token: T (2C - H - W) extra multiplications against C (H + W) saved.
        """
        rank, value = self.config.kv_lora_rank, self.config.v_head_dim
        head = self.config.qk_nope_head_dim + value
        return num_queries * (2 * rank - head) <= rank * head

    def _unfolded(self, tokens, up_CNX):
        """Keys and values of latents [B, S, C] and rotated keys [B, S, R]; these stay shared."""
        latent_BSC, rope_BSR = tokens
        nope = self.config.qk_nope_head_dim
        keys_values_BSNX = products.value.einsum("BSC,CNX->BSNX", latent_BSC, up_CNX)
        if isinstance(up_CNX, BlockScaled):
            keys_values_BSNX = sharding.own_slice(keys_values_BSNX, "heads", axis=2)
        keys_BSNH, values_BSNW = jnp.split(keys_values_BSNX, [nope], axis=-1)
        return (keys_BSNH, rope_BSR), values_BSNW

    def expanded(self, q_nope_BTNH, q_rope_BTNR, latent_BSC, rope_BSR, seen):
        """Multi-head attention over keys and values unfolded from the latents: [B, T, N, W]."""
        keys, values = self._unfolded((latent_BSC, rope_BSR), self.kv_b_proj[...])
        return attend((q_nope_BTNH, q_rope_BTNR), keys, values, seen, scale=self.scale)

    def absorbed(self, q_nope_BTNH, q_rope_BTNR, latent_BSC, rope_BSR, seen):
        """The same with W_UK folded into the query and W_UV into the output: [B, T, N, W]."""
        nope = self.config.qk_nope_head_dim
        up_CNX = whole(self.kv_b_proj[...], latent_BSC.dtype)
        up_key_CNH, up_value_CNW = up_CNX[..., :nope], up_CNX[..., nope:]
        q_latent_BTNC = jnp.einsum("BTNH,CNH->BTNC", q_nope_BTNH, up_key_CNH)
        out_BTNC = attend(
            (q_latent_BTNC, q_rope_BTNR),
            (latent_BSC, rope_BSR),
            latent_BSC,
            seen,
            scale=self.scale,
        )
        return jnp.einsum("BTNC,CNW->BTNW", out_BTNC, up_value_CNW)


def _written(
    cache_LBSX: Float[Array, "L B S X"],
    new_BTX: Float[Array, "B T X"],
    start_B: Int[Array, " B"],
    layer: int | Int[Array, ""],
) -> Float[Array, "L B S X"]:
    """T consecutive tokens of each row put into the cache of `layer`, from slot `start_B` on."""

    def put(cache_LBSX, new_BTX, start_B, layer):
        rows_B = jnp.arange(start_B.size, dtype=jnp.int32)
        at_B3 = jnp.stack([jnp.full_like(rows_B, layer), rows_B, start_B], axis=1)
        # A dynamic_update_slice for each row, as vmap has it, would turn the whole cache around.
        windows = jax.lax.ScatterDimensionNumbers((1, 2), (0, 1), (0, 1, 2))
        return jax.lax.scatter(
            cache_LBSX, at_B3, new_BTX, windows, unique_indices=True, indices_are_sorted=True
        )

    lies = sharding.spec(None, "batch", None, None)
    rows, starts = sharding.spec("batch", None, None), sharding.spec("batch")
    put = sharding.local(put, (lies, rows, starts, sharding.spec()), lies)
    new_BTX = sharding.reshard(new_BTX.astype(cache_LBSX.dtype), "batch", None, None)
    return put(cache_LBSX, new_BTX, sharding.reshard(start_B, "batch"), jnp.int32(layer))
