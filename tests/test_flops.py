"""FLOPs per token against the published active parameter counts and a count by hand."""

import dataclasses
import runpy
from pathlib import Path

import jax
import pytest

from dsjax import config, flops

ROOT = Path(__file__).parents[1]


def test_v3_equals_its_active_parameters_and_causal_attention():
    model = runpy.run_path(str(ROOT / "configs" / "v3.py"))["run"].model
    main = dataclasses.replace(model, mtp=())
    # 35.70B active parameters without embedding and head, and the head's 129,280 x 7,168; causal
    # attention at 4,096 tokens is 30.7 GFLOPs a token.
    expected = 6 * (35.70e9 + 129_280 * 7168) + 30.7e9
    assert flops.training_flops_per_token(main, 4096) == pytest.approx(expected, rel=1e-3)
    mtp = flops.training_flops_per_token(model, 4096) - flops.training_flops_per_token(main, 4096)
    # One MoE layer of 58, two hidden x hidden projections, the head once more.
    assert 8e9 < mtp < 12e9


ATTENTION = config.Mla(
    num_heads=2,
    q_lora_rank=None,
    kv_lora_rank=3,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=5,
)
BLOCK = config.Block(attention=ATTENTION, ffn=config.Dense(intermediate_size=7))
TINY = config.Model(
    vocab_size=11, hidden_size=8, layers=(config.LayerGroup(repeat=3, pattern=(BLOCK,)),)
)
# Queries, latent, keys and values out of it, output; then the feed-forward layer.
LINEAR = 8 * 2 * 6 + 8 * (3 + 2) + 3 * 2 * (4 + 5) + 2 * 5 * 8 + 3 * 8 * 7
CORE = 2 * (6 + 5) * (9 + 1) / 2


def test_one_tiny_layer_by_hand():
    assert flops.training_flops_per_token(TINY, 9) == 6 * (3 * (LINEAR + CORE) + 8 * 11)


def test_a_prompt_and_a_token_after_it_by_hand():
    prompt = flops.serving_flops_per_row(TINY, 9, is_prefill=True)
    assert prompt == 2 * (9 * 3 * (LINEAR + CORE) + 8 * 11)
    # Scores over latent and rotated key, sums of latents.
    token = flops.serving_flops_per_row(TINY, 9, is_prefill=False)
    assert token == 2 * (3 * (LINEAR + 2 * 9 * ((3 + 2) + 3)) + 8 * 11)


def test_peak_is_unknown_for_a_cpu():
    assert flops.peak_flops(jax.devices()) is None
