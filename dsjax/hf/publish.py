"""A `dsjax.config.Model` as a published `config.json`: the inverse of `dsjax.hf.config`.

`rope_scaling` is written the published way, which every version of transformers reads.
"""

import dataclasses
from typing import Any

from dsjax import config
from dsjax.hf.config import ARCHITECTURES, FIXED, Quantization, model_config


def hf_config(
    model: config.Model, *, dtype: str = "bfloat16", quantization: Quantization | None = None
) -> dict[str, Any]:
    """The fields of a `config.json` for `model`, V2's if its router is a softmax, else V3's.

    ValueError if no published config describes the model: these have dense layers, then layers of
    experts, all with one attention, and an MTP layer like the latter.
    """
    attention, dense, moe = _parts(model)
    is_v2 = isinstance(moe.router, config.SoftmaxRouter)
    model_type = "deepseek_v2" if is_v2 else "deepseek_v3"
    num_dense = sum(isinstance(block.ffn, config.Dense) for block in model.blocks)
    fields = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{name: value for name, (value, _) in FIXED.items() if name in WRITTEN},
        "first_k_dense_replace": num_dense,
        "hidden_size": model.hidden_size,
        "initializer_range": model.initializer_std,
        "intermediate_size": dense.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_hidden_layers": model.num_layers,
        "rms_norm_eps": model.rms_norm_eps,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **_attention_fields(attention),
        **_moe_fields(moe),
        **({} if is_v2 else {"num_nextn_predict_layers": len(model.mtp)}),
    }
    # A model has to read back as itself; its initializer is no part of what a config.json says.
    read_back = dataclasses.replace(model_config(fields), initializer_std=model.initializer_std)
    if read_back != _regrouped(model):
        raise ValueError(
            f"no published config.json describes this model: it would be read as {read_back}"
        )
    if quantization is not None:
        fields["quantization_config"] = quantization.published()
    return dict(sorted(fields.items()))


# What transformers does not know of published files and would take for something else is left out.
WRITTEN = FIXED.keys() - {"mlp_bias", "rms_norm_eps", "rope_interleave"}


def _parts(model: config.Model) -> tuple[config.Mla, config.Dense, config.Moe]:
    """The model's one attention, its dense layer and its experts; what is absent is filled in.

    A field of a layer that there is none of still has to stand in the file.
    """
    blocks = (*model.blocks, *model.mtp)
    attention = blocks[0].attention
    dense = [block.ffn for block in blocks if isinstance(block.ffn, config.Dense)]
    moe = [block.ffn for block in blocks if isinstance(block.ffn, config.Moe)]
    width = moe[0].intermediate_size if moe else dense[0].intermediate_size
    nobody = config.Moe(
        num_experts=2,
        num_chosen=1,
        num_shared=1,
        intermediate_size=width,
        router=config.SigmoidRouter(),
    )
    return (
        attention,
        dense[0] if dense else config.Dense(intermediate_size=width),
        moe[0] if moe else nobody,
    )


def _attention_fields(attention: config.Mla) -> dict[str, Any]:
    yarn = attention.rope.yarn
    return {
        "kv_lora_rank": attention.kv_lora_rank,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "rope_scaling": None
        if yarn is None
        else {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_context,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        },
        "rope_theta": attention.rope.theta,
        "v_head_dim": attention.v_head_dim,
    }


def _moe_fields(moe: config.Moe) -> dict[str, Any]:
    router = moe.router
    is_v2 = isinstance(router, config.SoftmaxRouter)
    grouped = "greedy" if router.num_groups == 1 else "group_limited_greedy"
    return {
        "moe_intermediate_size": moe.intermediate_size,
        "n_group": router.num_groups,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared,
        "norm_topk_prob": router.normalize,
        "num_experts_per_tok": moe.num_chosen,
        "routed_scaling_factor": router.scale,
        "scoring_func": "softmax" if is_v2 else "sigmoid",
        "topk_group": router.kept_groups,
        "topk_method": grouped if is_v2 else "noaux_tc",
    }


def _regrouped(model: config.Model) -> config.Model:
    """`model` with equal neighbouring layers in one group, as `model_config` reads them."""
    groups: list[config.LayerGroup] = []
    for block in model.blocks:
        if groups and groups[-1].pattern == (block,):
            groups[-1] = dataclasses.replace(groups[-1], repeat=groups[-1].repeat + 1)
        else:
            groups.append(config.LayerGroup(repeat=1, pattern=(block,)))
    return dataclasses.replace(model, layers=tuple(groups))
