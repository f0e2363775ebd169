"""Next-token and multi-token cross-entropy over packed rows, without ever forming all logits."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from dsjax import sharding
from dsjax.nn import zigzag
from dsjax.nn.attend import equal_parts
from dsjax.nn.masks import Places

TOKEN_BLOCK = 512


class Batch(NamedTuple):
    """Packed rows. `segments_BT`: document of each token inside its row from 1, 0 is padding.

    A training batch has a leading axis of micro-batches.
    """

    tokens_BT: Int[Array, "*n B T"]
    segments_BT: Int[Array, "*n B T"]
    positions_BT: Int[Array, "*n B T"]

    @property
    def places(self) -> Places:
        return Places(self.positions_BT, self.segments_BT)


def ahead(x_BT: Int[Array, "B T"], by: int) -> Int[Array, "B T"]:
    """x[:, i + by] at i; 0 where the row ends. The row is gathered for it: these are integers."""
    whole_BT = sharding.reshard(x_BT, "batch", None)
    moved_BT = jnp.pad(whole_BT[:, by:], ((0, 0), (0, by)))
    return sharding.reshard(moved_BT, "batch", "length")


def targets(batch: Batch, depth: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """t_{i+1+depth} at every i, and whether it exists in the same document."""
    other_BT = ahead(batch.segments_BT, depth + 1)
    valid_BT = (other_BT == batch.segments_BT) & (batch.segments_BT != 0)
    return ahead(batch.tokens_BT, depth + 1), valid_BT


def balanced(batch: Batch, wanted: Sequence[tuple]) -> tuple[Batch, Places, list[tuple]]:
    """Batch, its places, and targets, with rows laid out for context parallelism.

    Each device along `context` gets as much causal attention to compute as any other
    (`dsjax.nn.zigzag`), where rows divide into twice as many chunks as there are devices.
    """
    length, parts = batch.tokens_BT.shape[1], sharding.axis_size("context")
    if parts == 1 or length % (2 * parts):
        return batch, batch.places, list(wanted)

    def moved(x_BT):
        whole_BT = zigzag.lay_out(sharding.reshard(x_BT, "batch", None), parts)
        return sharding.reshard(whole_BT, "batch", "length")

    index_BT = jax.lax.broadcasted_iota(jnp.int32, batch.tokens_BT.shape, 1)
    batch, index_BT, wanted = jax.tree.map(moved, (batch, index_BT, list(wanted)))
    return batch, batch.places._replace(index_BT=index_BT), wanted


def target_count(batch: Batch, depth: int) -> Float[Array, ""]:
    """How many targets of `depth` the rows hold: the cross-entropy's denominator."""
    return targets(batch, depth)[1].sum(dtype=jnp.float32)


class Prediction(NamedTuple):
    """States of one depth, what they have to predict and where, and the weight of each nat."""

    hidden_BTD: Float[Array, "B T D"]
    targets_BT: Int[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    weight: Float[Array, ""] | float


class Score(NamedTuple):
    """Summed nats and number of correct guesses over the valid positions; without gradients."""

    nats: Float[Array, ""]
    correct: Float[Array, ""]


def cross_entropy(
    predictions: Sequence[Prediction], head_DV: Float[Array, "D V"]
) -> tuple[Float[Array, ""], list[Score]]:
    """The weighted sum of all predictions' nats, differentiable in states and head; the scores.

    Logits exist for one block of tokens at a time, in at least FP32, and each device has those of
    its own part of the vocabulary. Where gradients are wanted they are formed with the block's
    logits at hand, so that backward need not compute any again; hence the weights in advance.
    """
    hidden = [sharding.reshard(one.hidden_BTD, "batch", "length", None) for one in predictions]
    wide = np.promote_types(hidden[0].dtype, jnp.float32)
    rows = sharding.spec("batch", "length")
    head = sharding.spec("embed", "vocab")
    summed = sharding.local(
        functools.partial(_cross_entropy, wide),
        in_specs=(sharding.spec("batch", "length", None), head, (rows, rows, jax.P())),
        out_specs=(jax.P(), jax.P()),
    )
    others = [(one.targets_BT, one.valid_BT, jnp.asarray(one.weight, wide)) for one in predictions]
    targets, valid, weights = map(list, zip(*others, strict=True))
    head_DV = sharding.reshard(head_DV, "embed", "vocab")
    return summed(hidden, head_DV, (targets, valid, weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(wide, hidden, head_DV, others):
    """On one device: its tokens, its part of the vocabulary."""
    hidden, head_DV = _operands(wide, hidden, head_DV)

    def add(sums, rows):
        hidden_BtD, *targets = rows
        return jax.tree.map(jnp.add, sums, Score(*_block(hidden_BtD, head_DV, *targets))), None

    scores = []
    for hidden_BTD, targets_BT, valid_BT in zip(hidden, *others[:2], strict=True):
        blocks = _blocks(hidden_BTD, targets_BT, valid_BT)
        scores.append(jax.lax.scan(add, _nothing(wide), blocks)[0])
    return _over_devices(scores, others[2])


def _with_gradients(wide, hidden, head_DV, others):
    (hidden, head_DV), pull = jax.vjp(functools.partial(_operands, wide), hidden, head_DV)

    def add(weight, carry, rows):
        sums, of_head_DV = carry
        hidden_BtD, *targets = rows
        nats, pull, correct = jax.vjp(
            lambda *operands: _block(*operands, *targets), hidden_BtD, head_DV, has_aux=True
        )
        of_hidden_BtD, of_block_DV = pull(weight * jnp.ones_like(nats))
        sums = jax.tree.map(jnp.add, sums, Score(nats, correct))
        return (sums, of_head_DV + of_block_DV), of_hidden_BtD

    # One after the other: there is one gradient of the head, to which all add.
    scores, of_hidden, of_head_DV = [], [], jnp.zeros_like(head_DV)
    for hidden_BTD, targets_BT, valid_BT, weight in zip(hidden, *others, strict=True):
        blocks = _blocks(hidden_BTD, targets_BT, valid_BT)
        (score, of_head_DV), of_hidden_nBtD = jax.lax.scan(
            functools.partial(add, weight), (_nothing(wide), of_head_DV), blocks
        )
        scores.append(score)
        of_hidden.append(rearrange(of_hidden_nBtD, "n b c d -> b (c n) d"))
    return _over_devices(scores, others[2]), pull((of_hidden, of_head_DV))


def _scaled(wide, gradients, grad):
    of_sum, _ = grad
    scaled = jax.tree.map(lambda x: (x.astype(wide) * of_sum).astype(x.dtype), gradients)
    return *scaled, None


_cross_entropy.defvjp(_with_gradients, _scaled)


def _operands(wide, hidden, head_DV):
    """As blocks use them.

    Backward sums here and not block by block: the head's gradients over tokens, the tokens' over
    parts of the vocabulary.
    """
    head_axes = sharding.RULES["embed"]
    head_DV = sharding.gathered(head_DV, *head_axes, axis=0)
    others = (axis for axis in sharding.TOKEN_AXES if axis not in head_axes)
    # Widened here and narrowed in the block, the head's gradient adds up over blocks in FP32.
    head_DV = sharding.varying(head_DV, *others).astype(wide)
    return sharding.varying(hidden, *sharding.RULES["vocab"]), head_DV


def _blocks(hidden_BTD, *targets):
    """Tokens in blocks [n, B, t, ...]."""
    blocks = equal_parts(hidden_BTD.shape[1], at_most=TOKEN_BLOCK, least=2)
    return tuple(rearrange(x, "b (c n) ... -> n b c ...", n=blocks) for x in (hidden_BTD, *targets))


def _block(hidden_BtD, head_DV, targets_Bt, valid_Bt):
    """Summed nats and number of correct guesses of one block."""
    vocab_axes = sharding.RULES["vocab"]
    first = jax.lax.axis_index(sharding.cut(*vocab_axes)) if sharding.cut(*vocab_axes) else 0
    vocab = first * head_DV.shape[1] + jnp.arange(head_DV.shape[1], dtype=jnp.int32)[None, None]
    logits_BtV = jnp.einsum(
        "BTD,DV->BTV",
        hidden_BtD,
        head_DV.astype(hidden_BtD.dtype),
        preferred_element_type=head_DV.dtype,
    )
    target_BtV = jnp.where(vocab == targets_Bt[..., None], logits_BtV, 0)
    target_Bt = sharding.summed(target_BtV.sum(-1), *vocab_axes)
    best_Bt = sharding.largest(jax.lax.stop_gradient(logits_BtV.max(-1)), *vocab_axes)
    total_Bt = sharding.summed(jnp.exp(logits_BtV - best_Bt[..., None]).sum(-1), *vocab_axes)
    nats_Bt = jnp.log(total_Bt) + best_Bt - target_Bt
    correct_Bt = (target_Bt >= best_Bt) & valid_Bt
    return jnp.where(valid_Bt, nats_Bt, 0).sum(), correct_Bt.sum(dtype=jnp.float32)


def _nothing(wide):
    zero = Score(jnp.zeros((), wide), jnp.zeros((), jnp.float32))
    return sharding.varying(zero, *sharding.TOKEN_AXES)


def _over_devices(scores, weights):
    """The weighted sum, and all scores."""
    scores = jax.tree.map(lambda x: sharding.summed(x, *sharding.TOKEN_AXES), scores)
    total = sum(weight * score.nats for weight, score in zip(weights, scores, strict=True))
    return total, scores
