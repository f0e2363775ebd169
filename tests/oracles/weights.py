"""Which tensors a checkpoint of the family holds, and the rule that draws tiny ones.

Goldens store no weights: the program that writes them and the tests that read them both draw
from here, so this file needs NumPy only. Tensor names and config fields are the published ones.
"""

import math
import zlib
from collections.abc import Iterator

import numpy as np


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint that `config` (a published config.json) describes.

    Linear weights are [out, in]. MTP depth k is layer `num_hidden_layers + k - 1`; it carries
    copies of the embedding and the head (`shared_head.head`), as the published files do.
    """
    D, V = config["hidden_size"], config["vocab_size"]
    last = config["num_hidden_layers"]
    depth = config.get("num_nextn_predict_layers", 0)
    shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(last + depth):
        prefix = f"model.layers.{layer}."
        inside = dict(_block(config, dense=layer < config["first_k_dense_replace"]))
        if layer >= last:
            inside |= {"embed_tokens": (V, D), "shared_head.head": (V, D)}
            inside |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (D,))
            inside["eh_proj"] = (D, 2 * D)
        shapes |= {prefix + _file_name(name): shape for name, shape in inside.items()}
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def _file_name(name: str) -> str:
    return name if name.endswith("e_score_correction_bias") else f"{name}.weight"


def _block(config: dict, *, dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, N, C = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    H, R = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    W, Q = config["v_head_dim"], config["q_lora_rank"]
    yield "input_layernorm", (D,)
    yield "post_attention_layernorm", (D,)
    if Q is None:
        yield "self_attn.q_proj", (N * (H + R), D)
    else:
        yield "self_attn.q_a_proj", (Q, D)
        yield "self_attn.q_a_layernorm", (Q,)
        yield "self_attn.q_b_proj", (N * (H + R), Q)
    yield "self_attn.kv_a_proj_with_mqa", (C + R, D)
    yield "self_attn.kv_a_layernorm", (C,)
    yield "self_attn.kv_b_proj", (N * (H + W), C)
    yield "self_attn.o_proj", (D, N * W)
    if dense:
        yield from _swiglu("mlp", D, config["intermediate_size"])
        return
    E, F = config["n_routed_experts"], config["moe_intermediate_size"]
    yield "mlp.gate", (E, D)
    if config["topk_method"] == "noaux_tc":
        yield "mlp.gate.e_score_correction_bias", (E,)
    for expert in range(E):
        yield from _swiglu(f"mlp.experts.{expert}", D, F)
    yield from _swiglu("mlp.shared_experts", D, F * config["n_shared_experts"])


def _swiglu(prefix: str, D: int, F: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj", (F, D)
    yield f"{prefix}.up_proj", (F, D)
    yield f"{prefix}.down_proj", (D, F)


def shared_name(name: str) -> str:
    """The tensor that owns the values: MTP copies of embedding and head point at the main ones."""
    if name.endswith(".embed_tokens.weight"):
        return "model.embed_tokens.weight"
    if name.endswith(".shared_head.head.weight"):
        return "lm_head.weight"
    return name


def draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor; depends on the seed and its own name, never on the order of drawing.

    Float64 of values that float32 holds too: a float32 model has these weights and no others.
    Scales keep a tiny random model expressive: unit activations, router scores spread over
    their whole range, and a selection bias about as large as the scores it competes with.
    """
    rng = np.random.default_rng([seed, zlib.crc32(shared_name(name).encode())])
    return _drawn(rng, name, shape).astype(np.float32).astype(np.float64)


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("e_score_correction_bias"):
        return rng.normal(-0.3, 0.25, shape)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith("embed_tokens.weight"):
        return rng.normal(0.0, 1.0, shape)
    gain = 1.5 if ".gate.weight" in name else 1.0
    return rng.normal(0.0, gain / math.sqrt(shape[1]), shape)


def draw_all(seed: int, config: dict) -> dict[str, np.ndarray]:
    """Every tensor of `tensor_shapes(config)`."""
    return {name: draw(seed, name, shape) for name, shape in tensor_shapes(config).items()}
