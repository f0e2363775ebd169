"""A converted checkpoint on disk: one zarr array for each weight, one chunk for each tensor.

    dsjax.json          written last, so that without it nothing is a checkpoint (`Marker`)
    model/NAME          the weight NAME ("layers.1.blocks.0.attention.o_proj") as a zarr 3 array
    model/_METADATA     what makes `model` an item that orbax restores, onto any mesh
    hub/                config.json, tokenizer and other small files of the source

A chunk holds one published tensor, or a run of its rows if it is large: uncompressed, in published
order, while zarr's `transpose` codec states how that order becomes the weight's. So converting
copies bytes, and no two tensors share a file. FP8 weights stay FP8 on disk, with an array
NAME.scale_inv beside them: the stacked axes of the weight, then the published grid of blocks.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsjax.config import Model
from dsjax.hf import complete, fp8
from dsjax.hf.names import Source
from dsjax.hf.safetensors_file import KINDS, Entry, Stored
from dsjax.hf.tensors import Tensor, some

MARKER = "dsjax.json"
MODEL = "model"
HUB = "hub"
SCALES = ".scale_inv"
# Larger tensors are cut into chunks of about this size: what a reader of zarr takes at a time.
CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Array:
    """One zarr array. `chunk` is its chunk's shape; stored axis i of a chunk is axis `order[i]`.

    `first` is the axis along which large tensors are cut: the first one of the published order.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    order: tuple[int, ...]
    first: int

    @functools.cached_property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    def metadata(self) -> dict:
        """The content of its zarr.json."""
        little = {"configuration": {"endian": "little"}} if self.dtype.itemsize > 1 else {}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            # Scales that are bare exponents have no type of their own in zarr.
            "data_type": "uint8" if self.dtype.name == "float8_e8m0fnu" else self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [
                {"name": "transpose", "configuration": {"order": list(self.order)}},
                {"name": "bytes"} | little,
            ],
        }


class Chunk(NamedTuple):
    """A file below the checkpoint's directory, and the rows of a tensor that it holds."""

    file: str
    start: int
    end: int


class Slot(NamedTuple):
    """Where one published tensor of `shape` lies: in `array`, in the chunks at `place` (0 along
    `first`), each of which has room for `rows` rows.
    """

    array: Array
    place: tuple[int, ...]
    shape: tuple[int, ...]
    rows: int

    def chunks(self) -> Iterator[Chunk]:
        """In order; the last may have room for more rows than there are."""
        for number, start in enumerate(range(0, self.shape[0], self.rows)):
            place = list(self.place)
            place[self.array.first] = number
            file = "/".join((MODEL, self.array.name, "c", *map(str, place)))
            yield Chunk(file, start, min(start + self.rows, self.shape[0]))


class InChunks:
    """A published tensor inside a converted checkpoint; indexing reads the rows it needs."""

    def __init__(self, name: str, slot: Slot, directory: Path):
        self.shape, self.dtype = slot.shape, slot.array.dtype
        kind, rows = KINDS[self.dtype], slot.rows
        entry = Entry(kind, (rows, *self.shape[1:]), 0, slot.array.chunk_bytes)
        self._rows = rows
        self._chunks = [Stored(directory / chunk.file, name, entry) for chunk in slot.chunks()]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(self.shape[0])
        pieces = [
            self._chunks[k][slice(max(start - at, 0), min(stop - at, self._rows)), *index[1:]]
            for k in range(start // self._rows, max(math.ceil(stop / self._rows), 1))
            for at in [k * self._rows]
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Every array of a checkpoint by name, and the slot of every published tensor."""

    arrays: Mapping[str, Array]
    slots: Mapping[str, Slot]


def array_dtypes(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, np.dtype]:
    """The type of every array that `layout` needs to hold `tensors`.

    ValueError if tensors that make up one weight differ in type.
    """
    dtypes = {}
    for path, (source, _) in complete.weights(model).items():
        parts = [str(name) for name in source.names.flat]
        dtypes[path] = _one_dtype(parts, tensors)
        if dtypes[path] == fp8.VALUES:
            dtypes[path + SCALES] = _one_dtype([name + fp8.SCALE for name in parts], tensors)
    return dtypes


def _one_dtype(parts: list[str], tensors: Mapping[str, Tensor]) -> np.dtype:
    first, *others = parts
    dtype = np.dtype(tensors[first].dtype)
    for name in others:
        if tensors[name].dtype != dtype:
            raise ValueError(
                f"{name} is {tensors[name].dtype} but {first}, a part of the same weight, is "
                f"{dtype}; give one type for all with --dtype"
            )
    return dtype


def layout(model: Model, dtypes: Mapping[str, np.dtype]) -> Layout:
    """The arrays of `model`, by name of the types `dtypes`; an FP8 weight is one with its scales.

    ValueError if `dtypes` names other arrays than the model has.
    """
    arrays: dict[str, Array] = {}
    slots: dict[str, Slot] = {}

    def add(name: str, source: Source, shape: tuple[int, ...]) -> None:
        if name not in dtypes:
            raise ValueError(f"the type of the array {name} is not known")
        array = arrays[name] = _array(name, source, shape, np.dtype(dtypes[name]))
        stacked = [source.ours.index(letter) for letter in source.stacked]
        hub_shape = source.hub_shape(shape)
        rows = array.chunk[array.first] * (hub_shape[0] // shape[array.first])
        for place, hub_name in np.ndenumerate(source.names):
            where = [0] * len(shape)
            for axis, i in zip(stacked, place, strict=True):
                where[axis] = i
            slots[str(hub_name)] = Slot(array, tuple(where), hub_shape, rows)

    for path, (source, shape) in complete.weights(model).items():
        add(path, source, shape)
        if arrays[path].dtype == fp8.VALUES:
            add(path + SCALES, *_scales(source, shape))
    if unknown := sorted(dtypes.keys() - arrays.keys()):
        raise ValueError(f"the model has no place for the arrays {some(unknown)}")
    return Layout(arrays, slots)


def _array(name: str, source: Source, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    inner = [letter for axis in source.hub for letter in axis]
    chunk = [1 if letter in source.stacked else n for letter, n in source.sizes(shape).items()]
    first = source.ours.index(inner[0])
    size = math.prod(chunk) * dtype.itemsize
    if size > CHUNK_BYTES:
        chunk[first] = _cut(shape[first], max(1, CHUNK_BYTES * shape[first] // size))
    return Array(
        name=name,
        dtype=dtype,
        shape=shape,
        chunk=tuple(chunk),
        order=tuple(source.ours.index(letter) for letter in (*source.stacked, *inner)),
        first=first,
    )


def _cut(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most`; `most` itself if that is less than half of it."""
    divisor = next(d for d in range(most, 0, -1) if size % d == 0)
    return divisor if 2 * divisor >= most else most


def _scales(source: Source, shape: tuple[int, ...]) -> tuple[Source, tuple[int, ...]]:
    sizes = source.sizes(shape)
    blocks = tuple(f"block{i}" for i in range(len(source.hub)))
    scales = Source(
        names=np.asarray(source.names.astype(object) + fp8.SCALE, object),
        stacked=source.stacked,
        ours=(*source.stacked, *blocks),
        hub=tuple((letter,) for letter in blocks),
    )
    stacked = tuple(sizes[letter] for letter in source.stacked)
    return scales, (*stacked, *fp8.grid(source.hub_shape(shape)))


def orbax_metadata(arrays: Mapping[str, Array]) -> dict[str, dict]:
    """File name to content: what orbax wants to find beside the arrays of an item."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(array.shape),
            },
        }
        for name, array in arrays.items()
    }
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    return {
        "_METADATA": {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_CHECKPOINT_METADATA": {"item_handlers": handler, "custom_metadata": {}},
    }


def tensors_in(directory: Path, its_layout: Layout) -> dict[str, Tensor]:
    """Every published tensor of a complete conversion; no weight is read yet.

    ValueError naming the file that is missing or has another size or content than it must have.
    """
    for name, array in its_layout.arrays.items():
        file = directory / MODEL / name / "zarr.json"
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged or missing: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file} is damaged: it holds no object of fields")
        if found != array.metadata():
            differing = [key for key, value in array.metadata().items() if found.get(key) != value]
            raise ValueError(f"{file} is not as {MARKER} says: {some(differing)} differs")
    for slot in its_layout.slots.values():
        for chunk in slot.chunks():
            path = directory / chunk.file
            size = path.stat().st_size if path.is_file() else None
            if size != slot.array.chunk_bytes:
                raise ValueError(
                    f"{path} has {size} bytes, expected {slot.array.chunk_bytes}; delete "
                    f"{directory} and convert again"
                )
    return {name: InChunks(name, slot, directory) for name, slot in its_layout.slots.items()}
