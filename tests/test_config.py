"""Models that nothing can compute are refused, with the field, its value and the rule."""

import dataclasses
import math
import re

import pytest

from dsjax.config import Dense, LayerGroup, Rope, Yarn
from tests import drawn

MODEL = drawn.model(q_lora_rank=4)
BLOCK = MODEL.blocks[0]
YARN = Yarn(factor=40.0)


@pytest.mark.parametrize(
    ("component", "changes", "told"),
    [
        (Rope(), {"theta": 0.0}, "Rope.theta is 0.0; it must be a number above 1"),
        (Rope(), {"theta": 1.0}, "Rope.theta is 1.0"),
        (Rope(), {"theta": -5.0}, "Rope.theta is -5.0"),
        (Rope(), {"theta": math.inf}, "Rope.theta is inf"),
        (YARN, {"factor": 0.0}, "Yarn.factor is 0.0; it must be a number above 0"),
        (YARN, {"factor": math.nan}, "Yarn.factor is nan"),
        (YARN, {"original_context": 0}, "Yarn.original_context is 0; it must be a number of at"),
        (YARN, {"beta_fast": 0.0}, "Yarn.beta_fast is 0.0"),
        (YARN, {"beta_slow": 0.0}, "Yarn.beta_slow is 0.0"),
        (YARN, {"beta_fast": 0.5}, "Yarn.beta_fast is 0.5; it must be at least beta_slow=1.0"),
        (YARN, {"mscale_all_dim": -1.0}, "Yarn.mscale_all_dim is -1.0"),
        (BLOCK.attention, {"q_lora_rank": 0}, "Mla.q_lora_rank is 0; it must be at least 1, or No"),
        (BLOCK.attention, {"num_heads": 0}, "Mla.num_heads is 0; it must be a number of at least"),
        (BLOCK.ffn, {"num_shared": -1}, "Moe.num_shared is -1; it must be a number of at least 0"),
        (MODEL.layers[0], {"repeat": 0}, "LayerGroup.repeat is 0"),
        (MODEL.layers[0], {"pattern": ()}, "LayerGroup.pattern is (); give at least one"),
        (MODEL, {"layers": ()}, "Model.layers is (); give at least one"),
        (MODEL, {"rms_norm_eps": 0.0}, "Model.rms_norm_eps is 0.0"),
        (MODEL, {"initializer_std": -0.1}, "Model.initializer_std is -0.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else type(value).__name__,
)
def test_what_nothing_can_compute_is_refused(component: object, changes: dict, told: str):
    with pytest.raises(ValueError, match=re.escape(told)):
        dataclasses.replace(component, **changes)


def test_the_last_value_before_each_bound_is_taken():
    """Kimi K2's equal betas, no temperature on the scores, no shared experts, no MTP."""
    Rope(theta=1.5, yarn=Yarn(factor=0.5, beta_fast=1.0, beta_slow=1.0, mscale=0.0))
    dataclasses.replace(BLOCK.attention, q_lora_rank=None)
    dataclasses.replace(BLOCK.ffn, num_shared=0)
    one = LayerGroup(
        repeat=1, pattern=(dataclasses.replace(BLOCK, ffn=Dense(intermediate_size=1)),)
    )
    dataclasses.replace(MODEL, layers=(one,), mtp=(), initializer_std=0.0)
