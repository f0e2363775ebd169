"""What a model *is*: one frozen dataclass per component, and the layer plan as data.

A variant is a type, never a flag: a new attention or router is a new dataclass here and a new
module under `dsjax.nn`, joined by one line in the tables of `dsjax.model`. Field names are those
of the published `config.json` where it has them. Sizes count elements unless said otherwise.
"""

import dataclasses


def _positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{type(config).__name__}.{name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) with DeepSeek's softmax temperature.

    `original_context` is in tokens; `beta_fast` and `beta_slow` are rotations over it.
    `mscale_all_dim` enters the softmax scale squared, `mscale` over it multiplies cos and sin.
    """

    factor: float
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions on interleaved pairs; `yarn=None` leaves the frequencies as they are."""

    theta: float = 10000.0
    yarn: Yarn | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mla:
    """Multi-head latent attention (V2 eqs. 37-47). `q_lora_rank=None`: queries not compressed."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope = Rope()

    def __post_init__(self):
        _positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(
                f"Mla.qk_rope_head_dim is {self.qk_rope_head_dim}; rotation works on pairs, "
                "choose an even number of at least 2"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxRouter:
    """V2: softmax scores, a group counts as its best expert (`num_groups=1`: plain greedy)."""

    num_groups: int = 1
    kept_groups: int = 1
    normalize: bool = False
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidRouter:
    """V3: sigmoid scores, selection shifted by a bias, a group counts as its two best experts."""

    num_groups: int = 1
    kept_groups: int = 1
    normalize: bool = True
    scale: float = 1.0


Router = SoftmaxRouter | SigmoidRouter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """SwiGLU feed-forward layer of width `intermediate_size`."""

    intermediate_size: int

    def __post_init__(self):
        _positive(self, "intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """`num_experts` routed SwiGLU experts, `num_chosen` per token, plus `num_shared` always on."""

    num_experts: int
    num_chosen: int
    num_shared: int
    intermediate_size: int
    router: Router

    def __post_init__(self):
        _positive(self, "num_experts", "num_chosen", "intermediate_size")
        _positive(self.router, "num_groups")
        groups, kept = self.router.num_groups, self.router.kept_groups
        if self.num_experts % groups:
            raise ValueError(
                f"{self.num_experts} experts do not divide into num_groups={groups}; use a divisor"
            )
        if not 1 <= kept <= groups:
            raise ValueError(
                f"kept_groups is {kept}; it must lie between 1 and num_groups={groups}"
            )
        available = self.num_experts // groups * kept
        if self.num_chosen > available:
            raise ValueError(
                f"num_chosen is {self.num_chosen} but kept_groups={kept} of {groups} leave only "
                f"{available} experts to choose from"
            )
        if isinstance(self.router, SigmoidRouter) and self.num_experts // groups < 2:
            raise ValueError(
                f"{groups} groups of {self.num_experts} experts hold one expert each; the group "
                "score is the sum of the two best, so a group needs at least 2"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer layer: which attention, which feed-forward."""

    attention: Mla
    ffn: Dense | Moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """`pattern` repeated `repeat` times; the repeats share one compiled body (`lax.scan`)."""

    repeat: int
    pattern: tuple[Block, ...]

    def __post_init__(self):
        _positive(self, "repeat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A whole decoder.

    `vocab_size` counts embedding rows, padding included (V3: 129,280 rows for 128,815 token ids).
    `mtp` holds one block for each multi-token-prediction depth (V3 section 2.2); empty is none.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerGroup, ...]
    mtp: tuple[Block, ...] = ()
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    initializer_std: float = 0.006

    def __post_init__(self):
        _positive(self, "vocab_size", "hidden_size", "max_position_embeddings")

    @property
    def num_layers(self) -> int:
        return sum(group.repeat * len(group.pattern) for group in self.layers)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every main layer in order, without the MTP blocks."""
        return tuple(block for group in self.layers for block in group.pattern * group.repeat)
