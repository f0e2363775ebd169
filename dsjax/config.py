"""What a model *is*: one frozen dataclass per component, and the layer plan as data.

A variant is a type, never a flag: a new attention or router is a new dataclass here and a new
module under `dsjax.nn`, joined by one line in the tables of `dsjax.model`. Field names are those
of the published `config.json` where it has them. Sizes count elements unless said otherwise.
"""

import dataclasses
import math


def _at_least(least: int, config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not least <= value < math.inf:
            where = f"{type(config).__name__}.{name}"
            raise ValueError(f"{where} is {value}; it must be a number of at least {least}")


def _above(bound: int, config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not bound < value < math.inf:
            where = f"{type(config).__name__}.{name}"
            raise ValueError(f"{where} is {value}; it must be a number above {bound}")


def _not_empty(config, name: str) -> None:
    if not getattr(config, name):
        raise ValueError(f"{type(config).__name__}.{name} is (); give at least one")


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

    def __post_init__(self):
        _above(0, self, "factor", "beta_fast", "beta_slow")
        _at_least(1, self, "original_context")
        _at_least(0, self, "mscale", "mscale_all_dim")
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"Yarn.beta_fast is {self.beta_fast}; it must be at least "
                f"beta_slow={self.beta_slow}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions on interleaved pairs; `yarn=None` leaves the frequencies as they are."""

    theta: float = 10000.0
    yarn: Yarn | None = None

    def __post_init__(self):
        # Frequencies are powers of 1 / theta, and YaRN divides by its logarithm.
        _above(1, self, "theta")


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
        _at_least(1, self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"Mla.q_lora_rank is {self.q_lora_rank}; it must be at least 1, or None for "
                "queries that are not compressed"
            )
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
        _at_least(1, self, "intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """`num_experts` routed SwiGLU experts, `num_chosen` per token, plus `num_shared` always on."""

    num_experts: int
    num_chosen: int
    num_shared: int
    intermediate_size: int
    router: Router

    def __post_init__(self):
        _at_least(1, self, "num_experts", "num_chosen", "intermediate_size")
        _at_least(0, self, "num_shared")
        _at_least(1, self.router, "num_groups")
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
        _at_least(1, self, "repeat")
        _not_empty(self, "pattern")


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
        _at_least(1, self, "vocab_size", "hidden_size", "max_position_embeddings")
        _above(0, self, "rms_norm_eps")
        _at_least(0, self, "initializer_std")
        _not_empty(self, "layers")

    @property
    def num_layers(self) -> int:
        return sum(group.repeat * len(group.pattern) for group in self.layers)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every main layer in order, without the MTP blocks."""
        return tuple(block for group in self.layers for block in group.pattern * group.repeat)
