"""A published `config.json`: what it means, and everything that is refused."""

import re

import numpy as np
import pytest

import cases
from dsjax import hf
from dsjax.config import Dense, Moe, SigmoidRouter, SoftmaxRouter
from dsjax.nn import rope
from tests.convert.published import FP8

YARN = cases.CASES["v3"]["rope_scaling"]


REFUSED = [
    ("v3", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ("v3", {"attention_bias": True}, "attention_bias is True"),
    ("v3", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ("v3", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("v3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    ("v3", {"rope_interleave": False}, "rope_interleave is False"),
    ("v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ("v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ("v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
    ("v2", {"num_nextn_predict_layers": 1}, "V2 has no multi-token"),
    ("v3", {"index_topk": 2048}, "index_topk is 2048; this field is unknown"),
    ("v3", {"quantization_config": {"fmt": "e4m3"}}, "quant_method is missing"),
    ("v3", {"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt is 'e5m2'"),
    ("v3", {"quantization_config": FP8 | {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
    ("v3", {"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, "weight_block_size"),
    ("v3", {"quantization_config": FP8 | {"activation_scheme": "static"}}, "is 'static'"),
    ("v3", {"quantization_config": FP8 | {"scale_fmt": "ue4m3"}}, "scale_fmt is 'ue4m3'"),
    ("v3", {"quantization_config": FP8 | {"bits": 8}}, "quantization_config.bits is 8; this field"),
    ("v3", {"quantization_config": "fp8"}, "it must be an object"),
    ("v3", {"model_type": "llama"}, "model_type is 'llama'"),
    ("v3", {"architectures": ["DeepseekV2ForCausalLM"]}, "architectures"),
    ("v3", {"rope_scaling": {"type": "linear", "factor": 2}}, "'yarn' or 'default'"),
    (
        "v3",
        {"rope_scaling": {"type": "yarn", "factor": 2}},
        "original_max_position_embeddings is m",
    ),
    ("v3", {"rope_scaling": {"rope_type": "default", "factor": 2}}, "rope_scaling.factor is 2"),
    ("v3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters says it already"),
    ("v3", {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta"),
    ("v3", {"num_mtp_layers": 2}, "num_mtp_layers is 2"),
    ("v3", {"num_local_experts": 2}, "num_local_experts is 2"),
    ("v3", {"head_dim": 64}, "head_dim is 64"),
    ("v3", {"qk_head_dim": 64}, "qk_head_dim is 64"),
    ("v3", {"first_k_dense_replace": 5}, "first_k_dense_replace is 5"),
    ("v3", {"hidden_size": "16"}, "hidden_size is '16'"),
    ("v3", {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
    ("v3", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; 2 of 4 groups of n_routed_ex"),
    ("v2_lite", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; 1 of 1 groups of n_routed"),
    ("v3", {"n_group": 5}, "n_group is 5; it must cut n_routed_experts=12"),
    ("v3", {"n_group": 12}, "n_group is 12; it must cut n_routed_experts=12"),
    ("v3", {"topk_group": 5}, "topk_group is 5; it must be at most n_group=4"),
    ("v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; rotation works on pairs"),
    # Values of a kind that no published file has.
    ("v3", {"model_type": []}, "model_type is []"),
    ("v3", {"rope_scaling": 5}, "rope_scaling is 5; it must be an object"),
    ("v3", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
    ("v3", {"rope_scaling": {"rope_type": []}}, "rope type must be"),
    ("v3", {"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "rope type must be"),
    ("v3", {"rope_scaling": None, "rope_theta": [1]}, "rope_theta is [1]"),
    ("v3", {"n_group": 0}, "n_group is 0; it must be a whole number of at least 1"),
    # Numbers that nothing can be computed with.
    ("v3", {"q_lora_rank": 0}, "q_lora_rank is 0; it must be a whole number of at least 1"),
    ("v3", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("v3", {"n_shared_experts": -1}, "n_shared_experts is -1"),
    ("v3", {"rope_theta": 1}, "rope_theta is 1; it must be a number above 1"),
    ("v3", {"rope_theta": -5}, "rope_theta is -5; it must be a number above 1"),
    (
        "v3",
        {"rope_scaling": YARN | {"factor": 0}},
        "rope_scaling.factor is 0; it must be a",
    ),
    ("v3", {"rope_scaling": YARN | {"beta_slow": 0}}, "rope_scaling.beta_slow is 0"),
    (
        "v3",
        {"rope_scaling": YARN | {"beta_fast": 0.5}},
        "rope_scaling.beta_fast is 0.5; it must",
    ),
    (
        "v3",
        {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
        "rope_scaling.original_max_position_embeddings is 0",
    ),
    # Numbers that would take all the memory, or for ever.
    ("v3", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("v3", {"num_nextn_predict_layers": 10**12}, "num_nextn_predict_layers is 1000000000000"),
    ("v3", {"n_routed_experts": 4 * 10**8}, "n_routed_experts is 400000000"),
    ("v3", {"n_routed_experts": 10**5, "num_hidden_layers": 1000}, "n_routed_experts is 100000"),
    ("v3", {"hidden_size": 10**18}, "hidden_size is 1000000000000000000"),
]


@pytest.mark.parametrize(("name", "fields", "told"), REFUSED)
def test_a_config_that_the_model_cannot_follow_is_refused(name: str, fields: dict, told: str):
    # Never a name of `dsjax.config`, which nobody who has only the file can know.
    with pytest.raises(ValueError, match=rf"^config\.json: .*{re.escape(told)}"):
        hf.model_config(cases.CASES[name] | fields)


@pytest.mark.parametrize("field", ["hidden_size", "q_lora_rank", "norm_topk_prob", "rope_theta"])
def test_a_config_that_says_too_little_is_refused(field: str):
    fields = {k: v for k, v in cases.CASES["v3"].items() if k != field}
    with pytest.raises(ValueError, match=field):
        hf.model_config(fields)


def test_what_a_config_means():
    v2 = hf.model_config(cases.CASES["v2"])
    assert v2.layers[1].pattern[0].ffn.router == SoftmaxRouter(
        num_groups=4, kept_groups=2, normalize=False, scale=16.0
    )
    # V2's code scales only weights that it does not normalise.
    normal = hf.model_config(cases.CASES["v2"] | {"norm_topk_prob": True})
    assert normal.layers[1].pattern[0].ffn.router.scale == 1.0
    greedy = hf.model_config(cases.CASES["v2"] | {"topk_method": "greedy"})
    assert greedy.layers[1].pattern[0].ffn.router.num_groups == 1
    v3 = hf.model_config(cases.CASES["v3"])
    assert v3.layers[1].pattern[0].ffn.router == SigmoidRouter(
        num_groups=4, kept_groups=2, normalize=True, scale=2.5
    )
    assert [g.repeat for g in v3.layers] == [2, 2] and len(v3.mtp) == 1
    assert isinstance(v3.blocks[1].ffn, Dense) and isinstance(v3.blocks[2].ffn, Moe)
    only_moe = hf.model_config(cases.CASES["v3"] | {"first_k_dense_replace": 0})
    assert [g.repeat for g in only_moe.layers] == [4]
    renamed = {k: v for k, v in cases.CASES["v3"].items() if k != "num_nextn_predict_layers"}
    assert hf.model_config(renamed | {"num_mtp_layers": 1}) == v3


@pytest.mark.parametrize("absent", [{}, {"mscale_all_dim": 0}])
def test_without_mscale_all_dim_scores_are_not_heated(absent: dict):
    """As in DeepSeek's code: no m^2 on the scores, m(mscale) on cos and sin."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64} | absent
    found = hf.model_config(cases.CASES["v3"] | {"rope_scaling": yarn}).blocks[0].attention.rope
    assert rope.softmax_factor(found) == 1.0
    assert rope.amplitude(found) == pytest.approx(0.1 * np.log(40) + 1)
