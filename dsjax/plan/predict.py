"""Memory and time of a training step by arithmetic: good for choosing what to compile, no more."""

import collections
import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dsjax import config, flops, sharding
from dsjax.convert.fitting import Weight
from dsjax.losses import TOKEN_BLOCK
from dsjax.nn.dispatch import ROOM
from dsjax.plan.chips import Topology
from dsjax.plan.traffic import Traffic, wire
from dsjax.run import Run

# Bytes of a number while it is computed with, and where it must not lose any.
NARROW, WIDE = 2, 4
# Forward is one of the three parts of a step's FLOPs; this is how often it runs.
FORWARDS = {"none": 1, "full": 2, "save_latents": 2, "offload": 2}
# Not gathered as a layer is: the embedding's table stays where it lies, "logits" has the head.
OUTSIDE = ("embed", "lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes of one device and seconds of one step, by part; `available` bytes the device has.

    state       weights, both moments and gradients, cut as they are stored
    in use      the largest layer in BF16 as it is computed with, and its gradients
    saved       what backward keeps of every layer: its input; with "save_latents" the latents
                too, with "none" every value, with "offload" the inputs of two layers
    transient   the values of one layer and their gradients, rows with room for uneven experts
    logits      one block of logits and the head, in FP32, and the gradients of both

    compute     FLOPs of the formula, with forward's third again where it is recomputed, / BF16 peak
    near, far   bytes of weights and tokens sent / the bandwidth of `dsjax.plan.chips`
    """

    run: Run
    bytes: dict[str, float]
    seconds: dict[str, float]
    available: float

    @property
    def total_bytes(self) -> float:
        return math.fsum(self.bytes.values())

    @property
    def total_seconds(self) -> float:
        """With nothing hidden behind anything."""
        return math.fsum(self.seconds.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available


def predict(run: Run, weights: Sequence[Weight], topology: Topology) -> Prediction | None:
    """`weights` are `fitting.weights(run.model, is_fp8=False)`; `run.mesh` has no -1.

    None where a weight does not divide over the mesh.
    """
    step = _Step(run, topology)
    parts = [weight.bytes_per_device(step.sizes) for weight in weights]
    if None in parts:
        return None
    moments = 2 * (NARROW if run.optim.moments == "bf16" else WIDE)
    stored, used = 0.0, collections.defaultdict(float)
    for weight, (at_rest, in_use) in zip(weights, parts, strict=True):
        stored += at_rest / weight.itemsize
        used[weight.group] += in_use / weight.itemsize * (weight.group not in OUTSIDE)
    model = run.model
    blocks = collections.Counter((*model.blocks, *model.mtp))
    saved = {block: step.saved(block) for block in blocks}
    vocab, length = model.vocab_size / step.sizes["tensor"], run.batch.length
    block_of_tokens = step.tokens * min(TOKEN_BLOCK * step.sizes["context"] / length, 1)
    chip, sent = topology.chip, step.sent(weights, blocks)
    tokens = run.batch.size * length / topology.num_devices
    computed = flops.training_flops_per_token(model, length) * tokens
    return Prediction(
        run=run,
        bytes={
            "state": stored * (WIDE + moments + WIDE),
            "in use": 2 * NARROW * max(used.values()),
            "saved": max(saved.values()) * 2
            if run.remat == "offload"
            else sum(saved[block] * number for block, number in blocks.items()),
            "transient": 2 * max(step.transient(block) for block in blocks),
            "logits": 2 * WIDE * (block_of_tokens + model.hidden_size) * vocab,
        },
        seconds={
            "compute": computed * (FORWARDS[run.remat] + 2) / 3 / chip.bf16_flops,
            "near": sent.near / chip.ici_bandwidth,
            "far": sent.far / chip.dcn_bandwidth,
        },
        available=chip.hbm,
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    """One device's share of a step."""

    run: Run
    topology: Topology

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return dataclasses.asdict(self.run.mesh)

    def over(self, axes: Collection[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    @property
    def micros(self) -> int:
        return self.run.batch.size // self.run.batch.micro_size

    @property
    def tokens(self) -> float:
        """Of a micro-batch, while attention has them."""
        all_tokens = self.run.batch.micro_size * self.run.batch.length
        return all_tokens / self.over((*sharding.RULES["batch"], *sharding.RULES["length"]))

    @property
    def residual(self) -> float:
        """Of a micro-batch, between the layers and on their way to the experts."""
        parts = self.over(sharding.RULES["residual"])
        cut = "length" if self.run.batch.length % parts else "residual"
        all_tokens = self.run.batch.micro_size * self.run.batch.length
        return all_tokens / self.over((*sharding.RULES["batch"], *sharding.RULES[cut]))

    def saved(self, block: config.Block) -> float:
        """Bytes that backward keeps of one layer."""
        if self.run.remat == "none":
            return self.transient(block)
        latents = _latents(block.attention) if self.run.remat == "save_latents" else 0
        return NARROW * (self.residual * self.run.model.hidden_size + self.tokens * latents)

    def transient(self, block: config.Block) -> float:
        """Bytes of the values that one layer makes going forward."""
        mla, ffn, hidden = block.attention, block.ffn, self.run.model.hidden_size
        head = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
        heads = 2 * mla.num_heads * head / self.over(sharding.RULES["heads"])
        total = self.tokens * (_latents(mla) + heads) + self.residual * 4 * hidden
        width = ffn.intermediate_size
        if isinstance(ffn, config.Moe):
            total += self.residual * ROOM * ffn.num_chosen * (2 * hidden + 3 * width)
            width *= ffn.num_shared
        return NARROW * (total + self.tokens * 3 * width / self.over(sharding.RULES["ffn"]))

    @functools.cached_property
    def slices(self) -> np.ndarray:
        """The slice of each device of the mesh."""
        devices = np.arange(self.topology.num_devices) // self.topology.joined
        return devices.reshape([self.sizes[axis] for axis in sharding.AXES])

    def wire(self, kind: str, size: float, axes: Collection[str]) -> Traffic:
        """A collective of operands of `size` bytes along mesh axes."""
        # One group is like the others: the mesh is a box, and so are the slices.
        group = self.slices[tuple(slice(None) if axis in axes else 0 for axis in sharding.AXES)]
        s = len(set(group.flat))
        return wire(kind, size, group.size // s, s)

    def sent(self, weights: Sequence[Weight], blocks: Mapping[config.Block, int]) -> Traffic:
        """All that a step sends: for every micro-batch, weights to tokens and tokens to weights."""
        total, passes = Traffic(), FORWARDS[self.run.remat] + 1
        alike: dict[tuple, float] = collections.defaultdict(float)
        for weight in weights:
            at_rest, in_use = (
                frozenset(axis for cut in cuts for axis in cut)
                for cuts in (weight.stored, weight.used)
            )
            alike[at_rest, in_use] += math.prod(weight.shape) / self.over(at_rest)
        for (at_rest, in_use), numbers in alike.items():
            size, gathered = NARROW * numbers, at_rest - in_use
            total = total.plus(self.wire("all-gather", size, gathered), passes)
            whole = size * self.over(gathered)
            total = total.plus(self.wire("reduce-scatter", whole, gathered))
            copies = frozenset(sharding.TOKEN_AXES) - at_rest
            total = total.plus(self.wire("all-reduce", size, copies))
        for block, number in blocks.items():
            # Backward sends what forward does, the other way.
            total = total.plus(self._forward(block), passes * number)
        return Traffic().plus(total, self.micros)

    def _forward(self, block: config.Block) -> Traffic:
        """What a layer sends of its tokens."""
        hidden, mla = self.run.model.hidden_size, block.attention
        gathered = NARROW * self.residual * (hidden if mla.q_lora_rank is None else _latents(mla))
        total = self.wire("all-gather", gathered, ["tensor"])
        total = total.plus(self.wire("reduce-scatter", NARROW * self.tokens * hidden, ["tensor"]))
        keys = NARROW * self.tokens * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        total = total.plus(self.wire("all-gather", keys, ["context"]))
        if isinstance(block.ffn, config.Moe):
            group = self.over(sharding.RULES["experts"])
            # Devices that hold at least one of a token's experts, were these drawn at random.
            reached = group * (1 - (1 - 1 / group) ** block.ffn.num_chosen)
            rows = NARROW * self.residual * reached * hidden
            total = total.plus(self.wire("all-to-all", rows, sharding.RULES["experts"]), 2)
        return total


def _latents(mla: config.Mla) -> int:
    """Numbers per token that attention is compressed to."""
    return (mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim
