"""A published `config.json` to `dsjax.config.Model`: every field is used, checked or named as idle.

Nothing is guessed. A field this file does not know, or a value the model cannot follow, is refused
with the field's name, because a model that almost fits its config runs and is silently wrong.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax import config

# model_type to the class of the published code; Kimi K2 is DeepSeek-V3's under another name.
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
# Fields with one value that this model computes, and why there is no other.
FIXED: dict[str, tuple[Any, str]] = {
    "attention_bias": (False, "no projection has a bias"),
    "attention_dropout": (0.0, "there is no dropout"),
    "hidden_act": ("silu", "feed-forward layers are SwiGLU"),
    "mlp_bias": (False, "no projection has a bias"),
    "moe_layer_freq": (1, "every layer after the dense ones has experts"),
    "rms_norm_eps": (1e-6, "the latent norms of the published code use 1e-6 whatever it says"),
    "rope_interleave": (True, "rotary pairs are neighbours, as published"),
    "tie_word_embeddings": (False, "embedding and head are separate weights"),
}
# Fields that say nothing about the numbers a model computes.
IDLE = {
    *("_name_or_path", "auto_map", "bos_token_id", "dtype", "eos_token_id", "ep_size"),
    *("initializer_range", "output_router_logits", "pad_token_id", "pretraining_tp"),
    *("torch_dtype", "transformers_version", "use_cache"),
    # Training losses of other code bases; `dsjax.run.Objective` holds ours.
    *("aux_loss_alpha", "router_aux_loss_coef", "seq_aux"),
}
# Two names of one number: the published one, and what later software writes.
ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
}
USED = {
    *("architectures", "first_k_dense_replace", "head_dim", "hidden_size", "intermediate_size"),
    *("kv_lora_rank", "max_position_embeddings", "model_type", "moe_intermediate_size", "n_group"),
    *("n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_attention_heads"),
    *("num_experts_per_tok", "num_hidden_layers", "num_key_value_heads"),
    *("num_nextn_predict_layers", "q_lora_rank", "qk_head_dim", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta"),
    *("routed_scaling_factor", "scoring_func", "topk_group", "topk_method", "v_head_dim"),
    "vocab_size",
}
YARN_FIELDS = {
    *("beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim"),
    "original_max_position_embeddings",
}
# Counts that may be 0; no model is made of any other.
MAY_BE_ZERO = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"}
# Far more than any published model has: a file that says more would fill the memory with names.
MOST = {"num_hidden_layers": 10_000, "num_nextn_predict_layers": 100}
MOST_EXPERTS = 1_000_000
# Block FP8, field by field: the values that are read.
QUANTIZATION: dict[str, list[Any]] = {
    "activation_scheme": ["dynamic"],
    "fmt": ["e4m3"],
    "quant_method": ["fp8"],
    "scale_fmt": [None, "float", "ue8m0"],
    "weight_block_size": [[128, 128]],
}
# Which modules are left alone is said by the tensors themselves.
QUANTIZATION_IDLE = {"dequantize", "modules_to_not_convert"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Block FP8 (`dsjax.hf.fp8`); `ue8m0`: its scales are powers of two."""

    ue8m0: bool = False

    def published(self) -> dict[str, Any]:
        """The `quantization_config` that says so."""
        fields = {name: values[0] for name, values in QUANTIZATION.items() if values[0] is not None}
        return fields | ({"scale_fmt": "ue8m0"} if self.ue8m0 else {})


def model_config(published: Mapping[str, Any]) -> config.Model:
    """The model that a hub `config.json` (parsed) of V2, V2-Lite, V3, R1 or Kimi K2 describes.

    `rope_scaling` as published and `rope_parameters` as transformers 5 writes it are both read.
    ValueError names the field, its value and the rule it breaks.
    """
    known = USED | IDLE | FIXED.keys() | ALIASES.keys()
    for name, value in published.items():
        if name not in known:
            raise _refusal(name, value, "this field is unknown here, so the model would be another")
    fields = _renamed(published)
    for name, (needed, why) in FIXED.items():
        if name in fields and fields[name] != needed:
            raise _refusal(name, fields[name], f"it must be {needed!r}: {why}")
    quantization(fields)
    _one_of(fields, "model_type", ARCHITECTURES)
    architecture = ARCHITECTURES[fields["model_type"]]
    if fields.get("architectures", [architecture]) != [architecture]:
        rule = f"model_type {fields['model_type']!r} needs [{architecture!r}]"
        raise _refusal("architectures", fields["architectures"], rule)

    attention = _attention(fields)
    num_layers, num_dense = _int(fields, "num_hidden_layers"), _int(fields, "first_k_dense_replace")
    if num_dense > num_layers:
        rule = f"it must be at most num_hidden_layers={num_layers}"
        raise _refusal("first_k_dense_replace", num_dense, rule)
    dense = config.Dense(intermediate_size=_int(fields, "intermediate_size"))
    blocks = {
        config.Block(attention=attention, ffn=dense): num_dense,
        (moe := config.Block(attention=attention, ffn=_moe(fields))): num_layers - num_dense,
    }
    depth = _int(fields, "num_nextn_predict_layers", 0)
    experts = _int(fields, "n_routed_experts")
    if (num_layers + depth) * experts > MOST_EXPERTS:
        rule = f"with {num_layers + depth} layers it must be at most {MOST_EXPERTS} in all"
        raise _refusal("n_routed_experts", experts, rule)
    if depth and fields["model_type"] == "deepseek_v2":
        raise _refusal("num_nextn_predict_layers", depth, "V2 has no multi-token prediction")
    return config.Model(
        vocab_size=_int(fields, "vocab_size"),
        hidden_size=_int(fields, "hidden_size"),
        layers=tuple(
            config.LayerGroup(repeat=count, pattern=(block,))
            for block, count in blocks.items()
            if count
        ),
        mtp=(moe,) * depth,
        rms_norm_eps=_float(fields, "rms_norm_eps"),
        max_position_embeddings=_int(fields, "max_position_embeddings"),
    )


def quantization(published: Mapping[str, Any]) -> Quantization | None:
    """How the weights are quantized, by `quantization_config`; None if they are not.

    ValueError for any other way than block FP8 as DeepSeek publishes it.
    """
    found = published.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise _refusal("quantization_config", found, "it must be an object of fields")
    for name, value in found.items():
        allowed = QUANTIZATION.get(name)
        if name not in QUANTIZATION_IDLE and (allowed is None or value not in allowed):
            rule = "this field is unknown here" if allowed is None else f"supported: {allowed}"
            raise _refusal(f"quantization_config.{name}", value, rule)
    for name in ("quant_method", "weight_block_size"):
        _needed(found, name)
    return Quantization(ue8m0=found.get("scale_fmt") == "ue8m0")


def _attention(fields: dict) -> config.Mla:
    heads = _int(fields, "num_attention_heads")
    nope, rotary = _int(fields, "qk_nope_head_dim"), _int(fields, "qk_rope_head_dim")
    derived = {
        "num_key_value_heads": (heads, "num_attention_heads: every head has a latent key"),
        "qk_head_dim": (nope + rotary, "qk_nope_head_dim + qk_rope_head_dim"),
        "head_dim": (rotary, "qk_rope_head_dim, which transformers writes here"),
    }
    for name, (value, source) in derived.items():
        if fields.get(name, value) != value:
            raise _refusal(name, fields[name], f"it must be {value}, the {source}")
    if rotary % 2:
        raise _refusal("qk_rope_head_dim", rotary, "rotation works on pairs, so it must be even")
    query_rank = _needed(fields, "q_lora_rank")
    return config.Mla(
        num_heads=heads,
        q_lora_rank=None if query_rank is None else _int(fields, "q_lora_rank"),
        kv_lora_rank=_int(fields, "kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotary,
        v_head_dim=_int(fields, "v_head_dim"),
        rope=_rope(fields),
    )


def _rope(fields: dict) -> config.Rope:
    """`rope_theta` stands beside `rope_scaling` (published) or inside `rope_parameters`."""
    given = [n for n in ("rope_scaling", "rope_parameters") if fields.get(n) is not None]
    if len(given) == 2:
        raise _refusal("rope_scaling", fields["rope_scaling"], "rope_parameters says it already")
    name = given[0] if given else "rope_scaling"
    if given and not isinstance(fields[name], Mapping):
        raise _refusal(name, fields[name], "it must be an object of fields")
    inside = dict(fields[name]) if given else {}
    given_in = [d for d in (inside, fields) if d.get("rope_theta") is not None]
    thetas = [_float(d, "rope_theta", above=1) for d in given_in]
    if not thetas or len(set(thetas)) > 1:
        raise _refusal("rope_theta", thetas or None, "there must be one base of the frequencies")
    inside.pop("rope_theta", None)

    # Published files say `type`, later ones `rope_type`, transformers 5 sometimes both.
    said = [inside.pop(key) for key in ("type", "rope_type") if key in inside] or ["default"]
    kind = said[0]
    if kind not in ["default", "yarn"] or any(other != kind for other in said):
        rule = "the rope type must be 'yarn' or 'default'"
        raise _refusal(name, fields[name], rule)
    allowed = YARN_FIELDS if kind == "yarn" else set()
    for key, value in inside.items():
        if key not in allowed:
            raise _refusal(f"{name}.{key}", value, f"unknown for rope type {kind!r}")
    if not allowed:
        return config.Rope(theta=thetas[0])
    # Under their full names, as refusals say them.
    inside = {f"{name}.{key}": value for key, value in inside.items()}
    fast = _float(inside, f"{name}.beta_fast", 32.0, above=0)
    slow = _float(inside, f"{name}.beta_slow", 1.0, above=0)
    if fast < slow:
        raise _refusal(f"{name}.beta_fast", fast, f"it must be at least beta_slow={slow}")
    yarn = config.Yarn(
        factor=_float(inside, f"{name}.factor", above=0),
        original_context=_int(inside, f"{name}.original_max_position_embeddings"),
        beta_fast=fast,
        beta_slow=slow,
        # DeepSeek's published code defaults to 1 and 0: without the latter no m^2 on the scores.
        mscale=_float(inside, f"{name}.mscale", 1.0),
        mscale_all_dim=_float(inside, f"{name}.mscale_all_dim", 0.0),
    )
    return config.Rope(theta=thetas[0], yarn=yarn)


def _moe(fields: dict) -> config.Moe:
    is_v2 = fields["model_type"] == "deepseek_v2"
    normalize, scale = _bool(fields, "norm_topk_prob"), _float(fields, "routed_scaling_factor")
    if is_v2:
        _one_of(fields, "scoring_func", ["softmax"], "softmax")
        method = _one_of(fields, "topk_method", ["greedy", "group_limited_greedy"], "greedy")
        # V2's published code scales only the weights that it does not normalise.
        scale = 1.0 if normalize else scale
    else:
        _one_of(fields, "scoring_func", ["sigmoid"], "sigmoid")
        method = _one_of(fields, "topk_method", ["noaux_tc"], "noaux_tc")
    experts, groups, kept = _int(fields, "n_routed_experts"), 1, 1
    if method != "greedy":
        groups, kept = _groups(fields, experts, fewest=1 if is_v2 else 2)
    chosen, available = _int(fields, "num_experts_per_tok"), experts // groups * kept
    if chosen > available:
        rule = f"{kept} of {groups} groups of n_routed_experts={experts} leave only {available}"
        raise _refusal("num_experts_per_tok", chosen, rule)
    router = config.SoftmaxRouter if is_v2 else config.SigmoidRouter
    return config.Moe(
        num_experts=experts,
        num_chosen=chosen,
        num_shared=0
        if fields.get("n_shared_experts") is None
        else _int(fields, "n_shared_experts"),
        intermediate_size=_int(fields, "moe_intermediate_size"),
        router=router(
            num_groups=groups,
            kept_groups=kept,
            normalize=normalize,
            scale=scale,
        ),
    )


def _groups(fields: dict, experts: int, *, fewest: int) -> tuple[int, int]:
    """Groups of at least `fewest` experts (as many as a group's score sums), and how many stay."""
    groups, kept = _int(fields, "n_group"), _int(fields, "topk_group")
    if experts % groups or experts // groups < fewest:
        rule = f"it must cut n_routed_experts={experts} into equal groups of at least {fewest}"
        raise _refusal("n_group", groups, rule)
    if kept > groups:
        raise _refusal("topk_group", kept, f"it must be at most n_group={groups}")
    return groups, kept


def _refusal(name: str, value: Any, rule: str) -> ValueError:
    return ValueError(f"config.json: {name} is {value!r}; {rule}")


def _renamed(published: Mapping[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in published.items() if k not in ALIASES}
    for alias, name in ALIASES.items():
        if alias in published and fields.setdefault(name, published[alias]) != published[alias]:
            raise _refusal(alias, published[alias], f"{name}={fields[name]!r} contradicts it")
    return fields


def _one_of(fields: dict, name: str, allowed: Any, default: Any = None) -> Any:
    value = fields.get(name, default)
    if value not in list(allowed):
        rule = f"supported here: {', '.join(map(repr, allowed))}"
        if name == "scoring_func" or name == "topk_method":
            rule = f"{rule} for model_type {fields['model_type']!r}"
        raise _refusal(name, value, rule)
    return value


def _needed(fields: Mapping[str, Any], name: str, default: Any = None) -> Any:
    if name not in fields and default is None:
        raise ValueError(f"config.json: {name} is missing; the model cannot be built without it")
    return fields.get(name, default)


def _int(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _needed(fields, name, default)
    least = 0 if name in MAY_BE_ZERO else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _refusal(name, value, f"it must be a whole number of at least {least}")
    if value > (most := MOST.get(name, 2**31 - 1)):
        raise _refusal(name, value, f"it must be at most {most}")
    return value


def _float(
    fields: Mapping[str, Any], name: str, default: float | None = None, above: int | None = None
) -> float:
    value = _needed(fields, name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1e30 or (above is not None and value <= above):
        rule = "of at least 0" if above is None else f"above {above}"
        raise _refusal(name, value, f"it must be a number {rule}")
    return float(value)


def _bool(fields: Mapping[str, Any], name: str) -> bool:
    value = _needed(fields, name)
    if not isinstance(value, bool):
        raise _refusal(name, value, "it must be true or false")
    return value
