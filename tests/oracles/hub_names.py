"""Hub names for transformers' in-memory tensors, which keep all experts of a layer in one array."""

import re

import numpy as np
import torch


def mtp_name(name: str, num_hidden_layers: int) -> str:
    """The hub name of a parameter of transformers' `MtpModel`, whose layers count from zero."""
    layer, inside = re.fullmatch(r"layers\.(\d+)\.(.*)", name).groups()
    inside = inside.removeprefix("mtp_block.")
    inside = re.sub(r"^post_norm\.", "shared_head.norm.", inside)
    return f"model.layers.{num_hidden_layers + int(layer)}.{inside}"


def split_experts(name: str, fused: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views under hub names: `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F] expert by expert.

    The gate rows come first in `gate_up_proj`. Any other tensor is returned as it is.
    """
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts"):
        return {name: fused}
    parts = {}
    for expert, matrix in enumerate(fused):
        if kind == "down_proj":
            parts[f"{prefix}.{expert}.down_proj.weight"] = matrix
        else:
            gate, up = matrix.chunk(2)
            parts[f"{prefix}.{expert}.gate_proj.weight"] = gate
            parts[f"{prefix}.{expert}.up_proj.weight"] = up
    return parts


def fill(tensors: dict[str, torch.Tensor], weights: dict[str, np.ndarray]) -> None:
    """Copies drawn weights into in-memory tensors given under hub names (experts still fused)."""
    for name, tensor in tensors.items():
        for hub_name, view in split_experts(name, tensor.detach()).items():
            view.copy_(torch.from_numpy(weights[hub_name]))
