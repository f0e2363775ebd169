"""The weights of a training run under their published names, read slice by slice."""

import json
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore
from einops import rearrange

from dsjax.checkpoint import latest_model
from dsjax.hf import complete
from dsjax.hf.names import Source
from dsjax.hf.tensors import Tensor
from dsjax.run import Run, StandardLibrary

# A chunk of a stacked weight holds both halves of a gate-up pair: the second is read from here.
CACHE_BYTES = 256 * 2**20


class InRun:
    """A published tensor as a part of a trained weight; indexing reads the chunks it needs."""

    def __init__(self, store: tensorstore.TensorStore, source: Source, place: tuple[int, ...]):
        self._store, self._source = store, source
        self._place = dict(zip(source.stacked, place, strict=True))
        self.shape = source.hub_shape(tuple(store.shape))
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        sizes = self._source.sizes(tuple(self._store.shape))
        cut: dict[str, int | slice] = dict(self._place)
        within, inner = [], {}
        for (first, *others), part, size in zip(self._source.hub, index, self.shape, strict=True):
            # Of a group of axes, whole steps of the outermost one are read.
            width = math.prod(sizes[letter] for letter in others)
            start, stop, _ = part.indices(size)
            cut[first] = slice(start // width, math.ceil(stop / width))
            within.append(slice(start - start // width * width, stop - start // width * width))
            inner |= {letter: sizes[letter] for letter in others}
        single = [letter for letter in self._source.ours if letter not in self._place]
        key = tuple(cut.get(letter, slice(None)) for letter in self._source.ours)
        hub = " ".join(f"({' '.join(axis)})" for axis in self._source.hub)
        piece = self._store[key].read().result()
        return rearrange(piece, f"{' '.join(single)} -> {hub}", **inner)[tuple(within)]


class Trained(NamedTuple):
    """The newest weights of a run; `tokenizer` are the files of its tokenizer, if it has any."""

    run: Run
    tensors: dict[str, Tensor]
    tokenizer: dict[str, Path]
    fingerprint: dict[str, Any]


def open_run(run_dir: Path) -> Trained:
    """The run in `run_dir` and its newest checkpoint. ValueError if it has none."""
    run, directory = latest_model(run_dir)
    tree = json.loads((directory / "_METADATA").read_text())
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    tensors: dict[str, Tensor] = {}
    for path, (source, _) in complete.weights(run.model).items():
        files = {"driver": "file", "path": f"{directory}/"}
        store = tensorstore.open(
            {
                "driver": "zarr3" if tree["use_zarr3"] else "zarr",
                "kvstore": {"driver": "ocdbt", "base": files, "path": f"{path}/"},
            },
            open=True,
            context=context,
        ).result()
        for place, name in np.ndenumerate(source.names):
            tensors[str(name)] = InRun(store, source, place)
    manifest = zlib.crc32((directory / "manifest.ocdbt").read_bytes())
    known_by = {"step": directory.parent.name, "manifest": manifest}
    return Trained(run, tensors, _tokenizer_files(run), known_by)


def _tokenizer_files(run: Run) -> dict[str, Path]:
    if isinstance(run.data, StandardLibrary):
        return {}
    file = Path(run.data.tokenizer).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    found = {"tokenizer.json": file, "tokenizer_config.json": file.parent / "tokenizer_config.json"}
    return {name: path for name, path in found.items() if path.is_file()}
