"""Floating-point operations per token by a stated formula, and what chips can do at most."""

import jax

from dsjax import config
from dsjax.plan import chips


def _projections(mla: config.Mla, hidden: int) -> int:
    """Multiply-adds of one token in all but attention's core.

    The latent is unfolded into keys and values, or query and output folded: the same number.
    """
    head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    rank = mla.q_lora_rank
    queries = (
        hidden * mla.num_heads * head if rank is None else rank * (hidden + mla.num_heads * head)
    )
    latent = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    unfold = mla.kv_lora_rank * mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + latent + unfold + mla.num_heads * mla.v_head_dim * hidden


def _causal_core(mla: config.Mla, length: int) -> float:
    """Multiply-adds of one token: scores and values over (length + 1) / 2 keys."""
    head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    return mla.num_heads * (head + mla.v_head_dim) * (length + 1) / 2


def _ffn(ffn: config.Dense | config.Moe, hidden: int) -> float:
    if isinstance(ffn, config.Dense):
        return 3.0 * hidden * ffn.intermediate_size
    active = ffn.num_chosen + ffn.num_shared
    return 3.0 * hidden * ffn.intermediate_size * active + hidden * ffn.num_experts


def serving_flops_per_row(model: config.Model, length: int, *, is_prefill: bool) -> float:
    """FLOPs, two per multiply-add, of a prompt of `length` tokens, or of one token after them.

    Counted like `training_flops_per_token`, with the head once a row. A token that is decoded reads
    `length` latents by absorbed projections (`dsjax.nn.mla`). Without MTP.
    """
    hidden = model.hidden_size
    tokens = length if is_prefill else 1

    def core(mla: config.Mla) -> float:
        if is_prefill:
            return _causal_core(mla, length)
        return 1.0 * mla.num_heads * length * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)

    def block(spec: config.Block) -> float:
        mla = spec.attention
        return _projections(mla, hidden) + core(mla) + _ffn(spec.ffn, hidden)

    layers = sum(map(block, model.blocks))
    return 2.0 * (tokens * layers + hidden * model.vocab_size)


def training_flops_per_token(model: config.Model, length: int) -> float:
    """6 FLOPs per active multiply-add of a token, in sequences of `length` tokens.

    Counts every matrix product of forward (2 FLOPs per multiply-add) and backward (4): attention
    projections, causal attention at (length + 1) / 2 keys, chosen and shared experts, router, head,
    and MTP modules with their own use of the head. Not counted: the embedding lookup, norms,
    softmax, the optimizer, and whatever is recomputed.
    """
    hidden, head = model.hidden_size, model.hidden_size * model.vocab_size

    def block(spec: config.Block) -> float:
        mla = spec.attention
        return _projections(mla, hidden) + _causal_core(mla, length) + _ffn(spec.ffn, hidden)

    main = sum(block(spec) for spec in model.blocks) + head
    mtp = sum(block(spec) + 2 * hidden * hidden + head for spec in model.mtp)
    return 6.0 * (main + mtp)


def peak_flops(devices: list[jax.Device]) -> float | None:
    """BF16 peak of all devices together in FLOP/s, None where a kind is not in the table."""
    known = [chips.BY_KIND.get(device.device_kind) for device in devices]
    return None if None in known else sum(chip.bf16_flops for chip in known)
