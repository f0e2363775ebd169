"""The tiny configs of the goldens, in the style of a published config.json.

Together they move every switch of the family: compressed and plain queries, groups, top-k, one and
two shared experts, one to three dense layers, YaRN on and off and with unequal mscales, normalised
and raw weights, MTP depth 0, 1 and 2, and sizes that divide by nothing.
"""


def _v2(**changes: object) -> dict:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "kv_lora_rank": 8,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 8,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "v_head_dim": 8,
        "vocab_size": 40,
    } | changes


def _v3(**changes: object) -> dict:
    return (
        _v2(
            architectures=["DeepseekV3ForCausalLM"],
            model_type="deepseek_v3",
            n_shared_experts=1,
            norm_topk_prob=True,
            num_nextn_predict_layers=0,
            q_lora_rank=12,
            routed_scaling_factor=2.5,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
        )
        | changes
    )


def _yarn(**changes: object) -> dict:
    # A context this short puts the ramp inside the few rotary pairs of a tiny head.
    return {
        "type": "yarn",
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    } | changes


CASES: dict[str, dict] = {
    "v2_lite": _v2(),
    "v2": _v2(
        max_position_embeddings=2560,
        n_group=4,
        num_experts_per_tok=3,
        q_lora_rank=12,
        rope_scaling=_yarn(mscale=0.707, mscale_all_dim=0.707),
        routed_scaling_factor=16.0,
        topk_group=2,
        topk_method="group_limited_greedy",
    ),
    "v2_odd": _v2(
        first_k_dense_replace=2,
        hidden_size=21,
        intermediate_size=19,
        kv_lora_rank=10,
        max_position_embeddings=512,
        moe_intermediate_size=9,
        n_routed_experts=7,
        n_shared_experts=1,
        num_attention_heads=3,
        num_hidden_layers=4,
        num_key_value_heads=3,
        q_lora_rank=9,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        rope_scaling=_yarn(factor=8, mscale=1.0, mscale_all_dim=0.8),
        v_head_dim=5,
        vocab_size=37,
    ),
    "v3": _v3(
        first_k_dense_replace=2,
        max_position_embeddings=163840,
        n_group=4,
        n_routed_experts=12,
        num_experts_per_tok=3,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        rope_scaling=_yarn(original_max_position_embeddings=4096),
        topk_group=2,
    ),
    "kimi_k2": _v3(
        model_type="kimi_k2",
        hidden_size=20,
        max_position_embeddings=2048,
        rope_scaling=_yarn(beta_fast=1.0, beta_slow=1.0, factor=32.0),
        rope_theta=50000.0,
        routed_scaling_factor=2.827,
    ),
    "v3_odd": _v3(
        hidden_size=17,
        kv_lora_rank=9,
        max_position_embeddings=1024,
        moe_intermediate_size=7,
        n_group=2,
        n_routed_experts=10,
        norm_topk_prob=False,
        num_attention_heads=3,
        num_experts_per_tok=3,
        num_key_value_heads=3,
        num_nextn_predict_layers=2,
        q_lora_rank=None,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        rope_scaling=_yarn(factor=16, mscale=0.7, mscale_all_dim=1.0),
        routed_scaling_factor=1.5,
        v_head_dim=14,
        vocab_size=43,
    ),
    "v3_dense": _v3(
        first_k_dense_replace=3,
        moe_intermediate_size=10,
        n_group=2,
        n_shared_experts=2,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        topk_group=1,
    ),
}
