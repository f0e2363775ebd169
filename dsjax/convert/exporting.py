"""A converted checkpoint or a training run to a Hugging Face directory, as published ones are."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dsjax.config import Model
from dsjax.convert import casting
from dsjax.convert.opened import Checkpoint, open_checkpoint
from dsjax.convert.publishing import publish
from dsjax.convert.selecting import IN_LAYER
from dsjax.hf import names
from dsjax.hf.config import model_config
from dsjax.hf.publish import hf_config
from dsjax.hf.tensors import Tensor


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    to: casting.Precision | None = None,
    ue8m0: bool = False,
    shard_size: int = 5 * 10**9,
    process: tuple[int, int] = (0, 1),
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Writes `source` to `target` in precision `to`, by default as it is stored.

    An MTP layer gets its own copies of embedding and head, as published. `dry_run` tells the plan
    and writes nothing. ValueError and OSError say what is wrong with source, target or disk.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.is_published:
        raise ValueError(
            f"{source} is a Hugging Face directory already; `cast` changes its precision"
        )
    tensors = in_published_order(with_copies(checkpoint), checkpoint.model)
    config = checkpoint.published or of_run(checkpoint)
    if model_config(config) != checkpoint.model and checkpoint.published:
        raise ValueError(
            f"{source}/hub/config.json describes another model than {source}/dsjax.json; import "
            "the checkpoint again"
        )
    if to is not None:
        config = casting.recast_config(config, to, ue8m0=ue8m0)
        tensors = casting.recast(tensors, to, ue8m0=casting.has_ue8m0(config))
    plan = {
        "command": "export",
        "dtype": to,
        "scales": "ue8m0" if ue8m0 else "float",
        "source": checkpoint.fingerprint,
    }
    publish(
        tensors,
        target,
        plan=plan,
        config=config,
        passed=checkpoint.passed,
        shard_size=shard_size,
        process=process,
        dry_run=dry_run,
        say=say,
    )


def with_copies(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors with those that published MTP layers hold once more."""
    tensors = dict(checkpoint.tensors)
    for copy, original in names.copies(checkpoint.model).items():
        tensors[copy] = tensors[original]
    return tensors


def in_published_order(tensors: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Embedding, layer after layer, final norm and head, MTP layers."""

    num_layers = model.num_layers

    def place(name: str) -> tuple:
        match = IN_LAYER.fullmatch(name)
        if match is None:
            return (0 if name == names.OUTSIDE["embed"][0] else 2, 0, [], name)
        layer = int(match[1])
        numbers = [int(number) for number in re.findall(r"\d+", match[2])]
        return (1 if layer < num_layers else 3, layer, numbers, name)

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def of_run(checkpoint: Checkpoint) -> dict:
    """The config.json of a training run's model, its weights as they are stored."""
    embedding = checkpoint.tensors[names.OUTSIDE["embed"][0]]
    return hf_config(checkpoint.model, dtype=np.dtype(embedding.dtype).name)
