"""Which published tensors make up which of our weights, and in what layout: one table, as data.

A row says: our path inside a block, the hub's name inside a layer, and the layout as an einops
pattern from the hub to us. `{expert}` and `{pair}` (gate, up) in a name stand for many tensors,
stacked as the leading axes `e` and `p` of the pattern's left side. Read the pattern from right to
left to write a checkpoint. Axis letters are local to a row.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from dsjax import config, sharding

PAIR = ("gate", "up")

BLOCK: dict[str, tuple[str, str]] = {
    "input_norm.scale": ("input_layernorm.weight", "d -> d"),
    "attention.query.q_proj": ("self_attn.q_proj.weight", "(n x) d -> d n x"),
    "attention.query.q_a_proj": ("self_attn.q_a_proj.weight", "q d -> d q"),
    "attention.query.q_a_norm.scale": ("self_attn.q_a_layernorm.weight", "q -> q"),
    "attention.query.q_b_proj": ("self_attn.q_b_proj.weight", "(n x) q -> q n x"),
    "attention.kv_a_proj": ("self_attn.kv_a_proj_with_mqa.weight", "x d -> d x"),
    "attention.kv_a_norm.scale": ("self_attn.kv_a_layernorm.weight", "c -> c"),
    "attention.kv_b_proj": ("self_attn.kv_b_proj.weight", "(n x) c -> c n x"),
    "attention.o_proj": ("self_attn.o_proj.weight", "d (n w) -> n w d"),
    "post_attention_norm.scale": ("post_attention_layernorm.weight", "d -> d"),
    "ffn.gate_up_proj": ("mlp.{pair}_proj.weight", "p f d -> d p f"),
    "ffn.down_proj": ("mlp.down_proj.weight", "d f -> f d"),
    "ffn.router.gate_proj": ("mlp.gate.weight", "x d -> d x"),
    "ffn.router.bias": ("mlp.gate.e_score_correction_bias", "x -> x"),
    "ffn.experts.gate_up_proj": (
        "mlp.experts.{expert}.{pair}_proj.weight",
        "e p f d -> e d p f",
    ),
    "ffn.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight", "e d f -> e f d"),
    "ffn.shared.gate_up_proj": ("mlp.shared_experts.{pair}_proj.weight", "p f d -> d p f"),
    "ffn.shared.down_proj": ("mlp.shared_experts.down_proj.weight", "d f -> f d"),
}
# The MTP module of depth k is the hub's layer num_hidden_layers + k - 1.
MTP: dict[str, tuple[str, str]] = {
    "enorm.scale": ("enorm.weight", "d -> d"),
    "hnorm.scale": ("hnorm.weight", "d -> d"),
    "eh_proj": ("eh_proj.weight", "d x -> x d"),
    "norm.scale": ("shared_head.norm.weight", "d -> d"),
} | {f"block.{ours}": row for ours, row in BLOCK.items()}
OUTSIDE: dict[str, tuple[str, str]] = {
    "embed": ("model.embed_tokens.weight", "v d -> v d"),
    "norm.scale": ("model.norm.weight", "d -> d"),
    "lm_head": ("lm_head.weight", "v d -> d v"),
}
# Published MTP layers carry the main model's embedding and head once more.
MTP_COPIES = {
    "embed_tokens.weight": OUTSIDE["embed"][0],
    "shared_head.head.weight": OUTSIDE["lm_head"][0],
}
# Kimi K2 stores its rotary frequencies, which are computed from the config.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Where one weight comes from: hub `names`, an array with a dimension for each stacked axis.

    `stacked` holds the letters of these axes, `ours` all letters of our weight in order, and `hub`
    the axes of a single tensor, each one letter or a group such as ("n", "x").
    """

    names: np.ndarray
    stacked: tuple[str, ...]
    ours: tuple[str, ...]
    hub: tuple[tuple[str, ...], ...]

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(self.ours, shape, strict=True))

    @property
    def hub_axes(self) -> str:
        """The axes of a single tensor as einops has them: "(n x) (q)"."""
        return " ".join(f"({' '.join(axis)})" for axis in self.hub)

    def hub_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of every hub tensor of a weight of ours with `shape`."""
        sizes = self.sizes(shape)
        return tuple(int(np.prod([sizes[letter] for letter in axis])) for axis in self.hub)


def variables(module) -> Iterator[tuple[str, nnx.Variable]]:
    """(dotted path, variable) of every weight, in the module's order."""
    for path, variable in jax.tree_util.tree_leaves_with_path(module, is_leaf=sharding.is_variable):
        yield dotted(path), variable


def dotted(path: tuple) -> str:
    """A jax key path as in `layers.0.blocks.0.attention.kv_a_proj`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def sources(module, model: config.Model) -> dict[str, Source]:
    """The source of every weight of `module`, the (abstract) Transformer of `model`."""
    return {path: _source(path, model) for path, _ in variables(module)}


def leading_axes(source: Source) -> tuple[int, ...]:
    """The axes of a weight that stack layers and experts; they come before all others."""
    leading = itertools.takewhile(lambda letter: letter in source.stacked, source.ours)
    return tuple(range(len(list(leading))))


def copies(model: config.Model) -> Mapping[str, str]:
    """Hub tensors that repeat another one, to the name of that one."""
    return {
        f"model.layers.{model.num_layers + depth}.{copy}": original
        for depth in range(len(model.mtp))
        for copy, original in MTP_COPIES.items()
    }


def _source(path: str, model: config.Model) -> Source:
    if path in OUTSIDE:
        return _expanded("", *OUTSIDE[path], experts=0, layers=None)
    group, _, rest = path.partition(".")
    index, _, rest = rest.partition(".")
    if group == "mtp":
        layer = model.num_layers + int(index)
        experts = getattr(model.mtp[int(index)].ffn, "num_experts", 0)
        return _expanded(f"model.layers.{layer}.", *MTP[rest], experts=experts, layers=None)
    _, place, inside = rest.split(".", maxsplit=2)
    before = sum(g.repeat * len(g.pattern) for g in model.layers[: int(index)])
    this = model.layers[int(index)]
    layers = [before + r * len(this.pattern) + int(place) for r in range(this.repeat)]
    experts = getattr(this.pattern[int(place)].ffn, "num_experts", 0)
    return _expanded("model.layers.{layer}.", *BLOCK[inside], experts=experts, layers=layers)


def _expanded(
    prefix: str, name: str, layout: str, *, experts: int, layers: list[int] | None
) -> Source:
    left, _, right = layout.partition(" -> ")
    hub = [tuple(axis.strip("()").split()) for axis in re.findall(r"\([^)]*\)|\w", left)]
    ours = tuple(right.split())
    choices: dict[str, tuple[str, list]] = {}
    if layers is not None:
        choices["l"] = ("layer", layers)
        ours = ("l", *ours)
    if "{expert}" in name:
        choices["e"] = ("expert", list(range(experts)))
    if "{pair}" in name:
        choices["p"] = ("pair", list(PAIR))
    names = np.empty([len(values) for _, values in choices.values()], object)
    for place in np.ndindex(names.shape):
        chosen = zip(choices.values(), place, strict=True)
        names[place] = (prefix + name).format(**{key: values[i] for (key, values), i in chosen})
    hub = tuple(axis for axis in hub if axis[0] not in choices)
    return Source(names=names, stacked=tuple(choices), ours=ours, hub=hub)
