"""A part of a published checkpoint: some of its layers, with or without its MTP layers."""

import re
from collections.abc import Mapping
from typing import Any

from dsjax.hf.tensors import Tensor

IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")


def layer_range(text: str) -> tuple[int, int]:
    """`0:4` as (0, 4). ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"layers are {text!r}; write FIRST:END, as in 0:4 for the first four")
    return int(match[1]), int(match[2])


def selected_config(
    published: Mapping[str, Any], layers: tuple[int, int] | None, *, mtp: bool
) -> dict[str, Any]:
    """The config.json of the part; it agrees with `selected_tensors`."""
    fields = dict(published)
    if layers is not None:
        first, end = layers
        there = fields.get("num_hidden_layers", 0)
        if end > there:
            raise ValueError(f"layers {first}:{end} were asked for, but the model has {there}")
        dense = fields.get("first_k_dense_replace", 0) - first
        fields["num_hidden_layers"] = end - first
        fields["first_k_dense_replace"] = min(max(dense, 0), end - first)
    if not mtp:
        fields |= {name: 0 for name in MTP_FIELDS if name in fields}
    return fields


def selected_tensors(
    tensors: Mapping[str, Tensor], num_layers: int, layers: tuple[int, int] | None, *, mtp: bool
) -> dict[str, Tensor]:
    """The tensors of the part under the names they have in it; the whole has `num_layers`."""
    first, end = layers or (0, num_layers)
    chosen = {}
    for name, tensor in tensors.items():
        match = IN_LAYER.fullmatch(name)
        if match is None:
            chosen[name] = tensor
            continue
        layer = int(match[1])
        if first <= layer < end:
            chosen[f"model.layers.{layer - first}.{match[2]}"] = tensor
        elif layer >= num_layers and mtp:
            chosen[f"model.layers.{layer - num_layers + end - first}.{match[2]}"] = tensor
    return chosen
