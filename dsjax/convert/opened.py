"""A checkpoint of any kind, seen alike: its model, and its tensors under their published names."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.config import Model
from dsjax.convert import arrays, journal, shards
from dsjax.convert.shards import small_files
from dsjax.hf import files
from dsjax.hf.config import model_config
from dsjax.hf.tensors import Tensor
from dsjax.overrides import type_name
from dsjax.run_file import component, plain

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`tensors` are as stored: FP8 values and their scales are tensors of their own.

    `published` is its config.json (None: a training run), `passed` the small files that go with
    it, `fingerprint` what it is known by. `is_published`: it is a Hugging Face directory itself.
    """

    model: Model
    tensors: Mapping[str, Tensor]
    published: Mapping[str, Any] | None
    passed: Mapping[str, Path]
    fingerprint: Mapping[str, Any]
    is_published: bool = False


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A Hugging Face directory, a converted one, or the newest checkpoint of a training run.

    No weight is read yet. ValueError if `path` is none of them, or not complete.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"{str(path)!r} is no directory; download the model and give its local directory, or "
            "give a training run"
        )
    if (directory / "run.json").is_file():
        from dsjax.convert.trained import open_run

        trained = open_run(directory)
        return Checkpoint(
            model=trained.run.model,
            tensors=trained.tensors,
            published=None,
            passed=trained.tokenizer,
            fingerprint=trained.fingerprint,
        )
    if is_converted(directory):
        model, dtypes = read_marker(directory)
        hub = directory / arrays.HUB
        return Checkpoint(
            model=model,
            tensors=arrays.tensors_in(directory, arrays.layout(model, dtypes)),
            published=files.read_json(hub / "config.json"),
            passed=small_files(hub),
            fingerprint={
                file: zlib.crc32((directory / file).read_bytes())
                for file in (arrays.MARKER, f"{arrays.HUB}/config.json")
            },
        )
    check_finished(directory)
    published = files.read_json(directory / "config.json")
    return Checkpoint(
        model=model_config(published),
        tensors=files.open_tensors(directory),
        published=published,
        passed=small_files(directory),
        fingerprint=journal.fingerprint(directory),
        is_published=True,
    )


def is_complete(path: Path) -> bool:
    """Whether `path` holds an import with its marker."""
    return (path / arrays.MARKER).is_file()


def is_converted(path: Path) -> bool:
    """Whether `path` holds an import. ValueError if it holds an unfinished one."""
    if is_complete(path):
        return True
    if journal.begun(path) and (path / arrays.MODEL).is_dir():
        raise ValueError(
            f"{path} holds an unfinished import; run the same import command again to finish it"
        )
    return False


def check_finished(directory: Path) -> None:
    """ValueError if `directory` holds a Hugging Face directory that a conversion has not ended."""
    if journal.begun(directory) and not (is_converted(directory) or shards.is_complete(directory)):
        raise ValueError(
            f"{directory} holds an unfinished conversion; run the same command again to finish it"
        )


def write_marker(
    path: Path, model: Model, dtypes: Mapping[str, np.dtype], facts: Mapping[str, Any]
) -> None:
    """Declares the checkpoint in `path` complete; `facts` are for people."""
    content = {
        "version": VERSION,
        "model": plain(model),
        "dtypes": {name: np.dtype(dtype).name for name, dtype in dtypes.items()},
        **facts,
    }
    journal.replace_bytes(path / arrays.MARKER, json.dumps(content, indent=1).encode() + b"\n")


def read_marker(path: Path) -> tuple[Model, dict[str, np.dtype]]:
    """The model and the type of every array of a converted checkpoint."""
    file = path / arrays.MARKER
    content = files.read_json(file)
    if content.get("version") != VERSION:
        raise ValueError(f"{file} has version {content.get('version')!r}, expected {VERSION}")
    model = component(content.get("model"), "model")
    if not isinstance(model, Model):
        raise ValueError(f"{file} describes {type_name(type(model))}, not a Model")
    try:
        dtypes = {str(name): np.dtype(dtype) for name, dtype in content["dtypes"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} does not say which types its arrays have: {error}") from error
    return model, dtypes
