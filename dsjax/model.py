"""The decoder: blocks from their specs, scanned groups of layers, the MTP modules, the head."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsjax import config, sharding
from dsjax.nn.masks import Places
from dsjax.nn.mla import MlaAttention
from dsjax.nn.mlp import SwiGlu
from dsjax.nn.moe import MoeFfn, MoeStats
from dsjax.nn.norm import RMSNorm
from dsjax.nn.remat import LAYER_INPUT, REMAT
from dsjax.params import cast, normal

ATTENTION = {config.Mla: MlaAttention}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: config.Block, model: config.Model, *, rngs: nnx.Rngs):
        size, std, eps = model.hidden_size, model.initializer_std, model.rms_norm_eps
        self.input_norm = RMSNorm(size, eps=eps)
        attention = ATTENTION[type(spec.attention)]
        self.attention = attention(spec.attention, size, std=std, eps=eps, rngs=rngs)
        self.post_attention_norm = RMSNorm(size, eps=eps)
        self.ffn = (
            MoeFfn(spec.ffn, size, std=std, rngs=rngs)
            if isinstance(spec.ffn, config.Moe)
            else SwiGlu(size, spec.ffn.intermediate_size, std=std, rngs=rngs)
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        places: Places,
        cache: Any = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], Any, MoeStats | None]:
        """The layer's output, the new cache, and the experts' statistics if any.

        `cache` is that of a stack of layers, of which this one is number `layer`.
        """
        y_BTD, cache = self.attention(self.input_norm(x_BTD), places, cache, layer)
        x_BTD = x_BTD + y_BTD
        normed_BTD = self.post_attention_norm(x_BTD)
        if isinstance(self.ffn, MoeFfn):
            y_BTD, stats = self.ffn(normed_BTD, _counted(places))
        else:
            y_BTD, stats = self.ffn(normed_BTD), None
        return x_BTD + y_BTD, cache, stats


def _laid_out(places: Places) -> Places:
    """Callers may pass positions that lie anyhow; the layers want them beside the tokens."""
    return jax.tree.map(lambda x_BT: sharding.reshard(x_BT, "batch", "length"), places)


def _rows(table_VD, tokens_BT, *, by: tuple[str, ...], tokens_by: tuple[str, ...]):
    """On one device: its columns, for the tokens of all along `by`, exchanged for the others.

    `tokens_by`: mesh axes along which devices have tokens of their own.
    """
    if not by:
        return table_VD[tokens_BT]
    everyones_BT = sharding.gathered(tokens_BT, *by, axis=0)
    table_VD = sharding.varying(table_VD, *(axis for axis in tokens_by if axis not in by))
    return jax.lax.all_to_all(table_VD[everyones_BT], by, split_axis=0, concat_axis=2, tiled=True)


def _counted(places: Places) -> Bool[Array, "B T"]:
    """Tokens that are not padding."""
    if places.segments_BT is None:
        return jnp.ones_like(places.positions_BT, bool)
    return places.segments_BT != 0


class Superblock(nnx.Module):
    """One pass through a layer group's pattern: the body that `lax.scan` repeats."""

    def __init__(self, pattern: Sequence[config.Block], model: config.Model, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(spec, model, rngs=rngs) for spec in pattern])

    def __call__(self, x_BTD, places: Places, caches, layer):
        outcomes = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BTD, cache, stats = block(x_BTD, places, cache, layer)
            outcomes.append((cache, stats))
        caches, stats = zip(*outcomes, strict=True)
        return x_BTD, caches, stats


def _stack(group: config.LayerGroup, model: config.Model, rngs: nnx.Rngs) -> Superblock:
    """`group.repeat` superblocks in one, every weight with a leading layer axis."""
    keys = jax.random.split(rngs.params(), group.repeat)
    return jax.vmap(lambda key: Superblock(group.pattern, model, rngs=nnx.Rngs(key)))(keys)


class MtpModule(nnx.Module):
    """One depth of multi-token prediction (V3 section 2.2), sharing embedding and head.

        h'_i = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i)],   h^k = RMSNorm(TRM(h'))

    The embedding comes first, as in the released `eh_proj`; h^0 is the main model's hidden state
    after its final norm, and h^k after `norm` is what depth k + 1 gets.
    """

    def __init__(self, spec: config.Block, model: config.Model, *, rngs: nnx.Rngs):
        size, std, eps = model.hidden_size, model.initializer_std, model.rms_norm_eps
        self.enorm = RMSNorm(size, eps=eps)
        self.hnorm = RMSNorm(size, eps=eps)
        self.eh_proj = normal(rngs, (2 * size, size), (None, "embed"), std=std)
        self.block = Block(spec, model, rngs=rngs)
        self.norm = RMSNorm(size, eps=eps)

    def __call__(
        self,
        embedded_BTD: Float[Array, "B T D"],
        hidden_BTD: Float[Array, "B T D"],
        places: Places,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any, MoeStats | None]:
        joined_BTX = jnp.concatenate([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], axis=-1)
        x_BTD = jnp.einsum("BTX,XD->BTD", joined_BTX, self.eh_proj[...])
        x_BTD, cache, stats = self.block(x_BTD, places, cache)
        return self.norm(x_BTD), cache, stats


class Hidden(NamedTuple):
    """What the layers give: final-normed `hidden_BTD`, new caches, statistics per layer group.

    `stats[g][p]` belongs to block p of group g's pattern, stacked over its repeats; None if dense.
    """

    hidden_BTD: Float[Array, "B T D"]
    caches: Any
    stats: tuple


class Transformer(nnx.Module):
    """A DeepSeek decoder as a value: `Transformer(config, rngs=nnx.Rngs(0))(tokens)`."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.config = model
        rows, size, std = model.vocab_size, model.hidden_size, model.initializer_std
        self.embed = normal(rngs, (rows, size), (None, "embed"), std=std)
        self.layers = nnx.List([_stack(group, model, rngs) for group in model.layers])
        self.norm = RMSNorm(size, eps=model.rms_norm_eps)
        self.lm_head = normal(rngs, (size, rows), ("embed", "vocab"), std=std)
        self.mtp = nnx.List([MtpModule(spec, model, rngs=rngs) for spec in model.mtp])

    def __call__(
        self, tokens_BT: Int[Array, "B T"], places: Places | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, in the weights' dtype; each row is one document by default."""
        places = default_places(tokens_BT) if places is None else places
        return self.logits(self.hidden(tokens_BT, places).hidden_BTD)

    def embedded(
        self, tokens_BT: Int[Array, "B T"], dtype: jnp.dtype | None = None
    ) -> Float[Array, "B T D"]:
        """Rows of the embedding table, of which devices hold slices of the columns.

        The tokens are gathered and the rows sent home: the table itself never moves.
        """
        residual = sharding.residual(tokens_BT.shape[1])
        tokens_BT = sharding.reshard(tokens_BT, "batch", residual)
        lies, length_by = sharding.held(self.embed[...]), sharding.RULES[residual]
        by = sharding.axes_of(lies[1]) if sharding.active() else ()
        rows = sharding.local(
            functools.partial(_rows, by=by, tokens_by=(*sharding.BATCH_AXES, *length_by)),
            in_specs=(lies, sharding.spec("batch", residual)),
            out_specs=sharding.spec("batch", residual, None),
        )
        return rows(self.embed[...].astype(dtype or self.embed.dtype), tokens_BT)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The shared output head on final-normed states."""
        head_DV = sharding.reshard(self.lm_head[...], None, "vocab")
        hidden_BTD = sharding.reshard(hidden_BTD, "batch", "length", None)
        return jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        places: Places,
        caches: tuple | None = None,
        *,
        remat: str = "none",
        dtype: jnp.dtype | None = None,
    ) -> Hidden:
        """Runs all layers; `caches` (from `init_caches`) makes them look back and be extended.

        `remat` names what backward recomputes (`dsjax.nn.remat`). `dtype` is what each layer's
        weights are cast to when its turn comes, so that no second copy of all weights exists.
        """
        places = _laid_out(places)
        x_BTD = self.embedded(tokens_BT, dtype)
        if caches is None:
            caches = [(None,) * len(group.pattern) for group in self.config.layers]

        @REMAT[remat]
        def body(carry, turn):
            (x_BTD, cache), (superblock, layer) = carry, turn
            superblock = sharding.unshard(cast(superblock, dtype))
            x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
            x_BTD, cache, stats = superblock(x_BTD, places, cache, layer)
            return (x_BTD, cache), stats

        outcomes = []
        for group, stack, cache in zip(self.config.layers, self.layers, caches, strict=True):
            # Caches are carried along, where XLA writes them in place: of each only the new slots.
            turns = stack, jnp.arange(group.repeat, dtype=jnp.int32)
            (x_BTD, cache), stats = jax.lax.scan(body, (x_BTD, cache), turns)
            outcomes.append((cache, stats))
        caches, stats = zip(*outcomes, strict=True)
        return Hidden(self.norm(x_BTD), caches, stats)

    def mtp_hidden(
        self,
        hidden_BTD: Float[Array, "B T D"],
        next_tokens: Sequence[Int[Array, "B T"]],
        places: Places,
        *,
        remat: str = "none",
        dtype: jnp.dtype | None = None,
    ) -> tuple[list[Float[Array, "B T D"]], list[MoeStats | None]]:
        """Normed states of each MTP depth k, given tokens t_{i+k} at every position i."""
        places = _laid_out(places)

        @REMAT[remat]
        def run(module, tokens_BT, hidden_BTD):
            hidden_BTD = checkpoint_name(hidden_BTD, LAYER_INPUT)
            embedded_BTD = self.embedded(tokens_BT, dtype)
            module = sharding.unshard(cast(module, dtype))
            hidden_BTD, _, stats = module(embedded_BTD, hidden_BTD, places)
            return hidden_BTD, stats

        states, all_stats = [], []
        for module, tokens_BT in zip(self.mtp, next_tokens, strict=True):
            hidden_BTD, stats = run(module, tokens_BT, hidden_BTD)
            states.append(hidden_BTD)
            all_stats.append(stats)
        return states, all_stats

    def init_caches(self, batch: int, num_slots: int) -> tuple:
        """Empty caches of all main layers, in the weights' dtype, stacked as the layers are."""
        how = batch, num_slots, self.embed.dtype
        return tuple(
            tuple(block.attention.init_cache(*how, layers=group.repeat) for block in stack.blocks)
            for group, stack in zip(self.config.layers, self.layers, strict=True)
        )


def default_places(tokens_BT: Int[Array, "B T"]) -> Places:
    """Every row one document from position 0."""
    return Places(jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1))


def abstract(model: config.Model) -> Transformer:
    """The model with shapes and dtypes but no memory, for counting, sharding and restoring."""
    return jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
