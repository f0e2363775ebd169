"""Checkpoint directories as `save_pretrained` writes them, the MTP layer added as published.

transformers drops MTP layers when it loads and saves, so their tensors go into one more shard with
the published names: `embed_tokens`, `enorm`, `hnorm`, `eh_proj`, `shared_head.*`. transformers'
own MTP loader then has to find every one of them.
"""

import json
import os
import pathlib
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

INDEX = "model.safetensors.index.json"


def save(
    directory: pathlib.Path,
    model: PreTrainedModel,
    drawn: dict[str, np.ndarray],
    *,
    max_shard_size: str,
) -> None:
    """Writes `model` (float32) and what `drawn` holds beyond it; replaces an older directory.

    Raises ValueError if a file on disk does not hold exactly `drawn` under its hub names.
    """
    temporary = directory.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, max_shard_size=max_shard_size)
    beyond = model.config.num_hidden_layers
    extra = {
        name: torch.from_numpy(values).float()
        for name, values in drawn.items()
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= beyond
    }
    if extra:
        _add_shard(temporary, "model-mtp.safetensors", extra)
    _check(temporary, drawn)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)


def _add_shard(directory: pathlib.Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / file, metadata={"format": "pt"})
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(tensors, file)
    index["metadata"]["total_size"] += sum(t.nbytes for t in tensors.values())
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check(directory: pathlib.Path, drawn: dict[str, np.ndarray]) -> None:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    if found.keys() != drawn.keys():
        raise ValueError(f"{directory} differs in {sorted(found.keys() ^ drawn.keys())}")
    for name, values in drawn.items():
        if not np.array_equal(found[name].numpy(), values.astype(np.float32)):
            raise ValueError(f"{name} in {directory} does not hold the drawn values")


def load_mtp(directory: pathlib.Path, model_class: type) -> tuple[PreTrainedModel, MtpModel]:
    """Both halves of a saved directory, read by transformers' own loaders."""

    config = json.loads((directory / "config.json").read_text())
    last, depth = config["num_hidden_layers"], config["num_nextn_predict_layers"]

    class Named(model_class):
        # As shipped this names layer 61 only: the MTP layers of any other model are not found.
        _keys_to_ignore_on_load_unexpected = tuple(
            rf"model\.layers\.{layer}\..*" for layer in range(last, last + depth)
        )

    model = Named.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    model.config._experts_implementation = "eager"
    return model.eval(), MtpModel.from_pretrained(model).eval()
