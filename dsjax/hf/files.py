"""The tensors of a checkpoint directory, found and described now, read from disk when sliced."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from dsjax.hf import strict_json
from dsjax.hf.fused import unfused
from dsjax.hf.safetensors_file import Stored, read_header
from dsjax.hf.tensors import Tensor, some

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# FP8 values carry their scales in tensors of their own: `dsjax.hf.fp8`.
WEIGHTS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E8M0")
# The largest published index has 15 MB.
LONGEST_JSON = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError naming the file if there is none."""
    try:
        size = path.stat().st_size
        if size > LONGEST_JSON:
            raise ValueError(f"it has {size} bytes, more than {LONGEST_JSON}")
        value = strict_json.parse(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object of fields")
    return value


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the directory's safetensors files by hub name; no weight is read yet.

    FP8 values and their scales are tensors like any other; fused experts are seen one by one.
    ValueError names the file that is missing, damaged, outside the directory, or not as the index
    says, and the tensor of a type that weights do not come in.
    """
    return unfused(opened(directory, listed(directory)))


def opened(directory: Path, files: Mapping[str, set[str] | None]) -> dict[str, Stored]:
    """The tensors of some of the directory's files; each has to hold those listed for it."""
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        others = f", and neither do {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"{directory / missing[0]} does not exist{others}; the checkpoint is not complete"
        )
    found = {file: _stored(directory / file) for file in files}
    for file, expected in files.items():
        if expected is not None and found[file].keys() != expected:
            differing = sorted(found[file].keys() ^ expected)
            raise ValueError(
                f"{directory / file} and {INDEX} disagree on {len(differing)} tensors: "
                f"{some(differing)}"
            )
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def _stored(path: Path) -> dict[str, Stored]:
    entries = read_header(path)
    for name, entry in entries.items():
        if entry.kind not in WEIGHTS:
            raise ValueError(f"{name} in {path} is {entry.kind}, expected {', '.join(WEIGHTS)}")
    return {name: Stored(path, name, entry) for name, entry in entries.items()}


def listed(directory: Path) -> dict[str, set[str] | None]:
    """The directory's safetensors files to the tensors that its index, if any, says they hold."""
    if (directory / INDEX).is_file():
        return dict(_of_index(directory / INDEX))
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    pickled = sorted(directory.glob("*.bin"))
    why = f"pickled weights like {pickled[0].name} are not read; " if pickled else ""
    raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}; {why}use safetensors")


def _of_index(index: Path) -> dict[str, set[str]]:
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
