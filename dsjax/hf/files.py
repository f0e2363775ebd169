"""The tensors of a checkpoint directory, found and described now, read from disk when sliced."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


class Stored:
    """One tensor in a safetensors file; indexing reads that part and no more."""

    def __init__(self, lazy: Any, dtype: np.dtype):
        self._lazy = lazy
        self.shape: tuple[int, ...] = tuple(lazy.get_shape())
        self.dtype = dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._lazy[index]


# What loading takes: stored tensors, or arrays already in memory.
Tensor = Stored | np.ndarray


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError naming the file if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a Hugging Face model directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object of fields")
    return value


def open_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's safetensors files by name; no weight is read yet.

    ValueError names the file that is missing, damaged, outside the directory, or not as the index
    says, and the tensor of a type that is none of BF16, FP16, FP32.
    """
    if (directory / INDEX).is_file():
        listed = _listed(directory / INDEX)
    elif (directory / SINGLE).is_file():
        listed = {SINGLE: None}
    else:
        pickled = sorted(directory.glob("*.bin"))
        why = f"pickled weights like {pickled[0].name} are not read; " if pickled else ""
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}; {why}use safetensors")
    tensors: dict[str, Stored] = {}
    for file, expected in listed.items():
        found = _opened(directory / file)
        if expected is not None and found.keys() != expected:
            names = sorted(found.keys() ^ expected)
            raise ValueError(
                f"{directory / file} and {INDEX} disagree on {len(names)} tensors: {some(names)}"
            )
        tensors |= found
    return tensors


def some(names: list[str]) -> str:
    """The first few of a list that may be long."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _listed(index: Path) -> Mapping[str, set[str]]:
    """File to the tensors it must hold."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} has no weight_map of tensor to file names")
    files: dict[str, set[str]] = {}
    for name, file in places.items():
        # By its words, not resolved: a hub cache is a folder of links.
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise ValueError(f"{index} names {file!r}, which lies outside of its directory")
        files.setdefault(file, set()).add(name)
    return files


def _opened(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the checkpoint is not complete")
    try:
        file = safetensors.safe_open(path, framework="numpy")
        lazy = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return {name: Stored(tensor, _dtype(path, name, tensor)) for name, tensor in lazy.items()}


def _dtype(path: Path, name: str, tensor: Any) -> np.dtype:
    kind = tensor.get_dtype()
    if kind not in DTYPES:
        raise ValueError(
            f"{name} in {path} is {kind}; weights must be BF16, FP16 or FP32: convert the "
            "checkpoint to BF16 first"
        )
    return np.dtype(DTYPES[kind])
