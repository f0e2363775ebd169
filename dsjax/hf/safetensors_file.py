"""One safetensors file: a header of which nothing is believed, and tensors read in parts.

The format: eight bytes N (little endian), N bytes of JSON `{name: {dtype, shape, data_offsets}}`,
then the values, row-major, with nothing between, before or after them. Reading is by `pread`: pages
of a memory-mapped file would count as memory in use, and a file cut short would end the process.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.hf import strict_json

# Types that weights come in, then types that are read so that an error can name them.
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
} | {
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    **{f"{sign}{8 * n}": np.dtype(f"{sign.lower()}{n}") for sign in "IU" for n in (1, 2, 4, 8)},
}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
# What the format's own library takes at most; the largest published header has 20 MB.
LONGEST_HEADER = 100_000_000
MOST_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor as its header describes it: its values are the bytes `start` to `stop` of the file.

    `kind` is the header's name of `dtype`.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]


class Stored:
    """One tensor in a safetensors file; indexing reads that part and no more."""

    def __init__(self, path: Path, name: str, entry: Entry):
        self.path, self.name, self.entry = path, name, entry
        self.shape, self.dtype = entry.shape, entry.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*part.indices(n)) for part, n in zip(index, self.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], self.dtype)
        if not out.size:
            return out
        # Axes after `last` are read whole, so what one index of the axes before it selects is one
        # piece of the file.
        last = max((i for i, n in enumerate(self.shape) if len(ranges[i]) < n), default=0)
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        pieces = out.reshape(*out.shape[:last], -1).view(np.uint8)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for place in np.ndindex(*out.shape[:last]):
                where = (*place, 0)[: len(self.shape)]
                first = sum(
                    ranges[i].start * strides[i] + where[i] * strides[i] for i in range(len(where))
                )
                offset = self.entry.start + first * self.dtype.itemsize
                self._fill(descriptor, pieces[place], offset)
        finally:
            os.close(descriptor)
        return out

    def _fill(self, descriptor: int, piece: np.ndarray, offset: int) -> None:
        rest = memoryview(piece).cast("B")
        while rest:
            count = os.preadv(descriptor, [rest], offset)
            if not count:
                raise ValueError(
                    f"{self.path}: the file ends inside {self.name}, at byte {offset} of "
                    f"{self.entry.stop}; it was whole when its header was read"
                )
            rest, offset = rest[count:], offset + count


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of the file by name, in the order of the header.

    ValueError, naming file, tensor, expected and found, unless each is described in full and the
    values fill the file from the end of the header to its last byte.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(_exactly(file, min(8, size)), "little")
            if size < 8 or length > size - 8:
                raise _damage(path, f"a header of {length} bytes does not fit into {size} bytes")
            if length > LONGEST_HEADER:
                raise _damage(path, f"its header has {length} bytes, more than {LONGEST_HEADER}")
            text = _exactly(file, length)
    except OSError as error:
        raise _damage(path, error.strerror or str(error)) from error
    described = _parsed(path, text)
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damage(path, "its __metadata__ is no object of strings")
    entries = {}
    for name, fields in described.items():
        try:
            entries[name] = _entry(fields, 8 + length, size)
        except ValueError as error:
            raise _damage(path, f"{name[:200]}: {error}") from None
    _check_tiling(path, entries, 8 + length, size)
    return entries


def _damage(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged or no safetensors file: {what}")


def _exactly(file: Any, count: int) -> bytes:
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        if text[:1] != b"{":
            raise ValueError(f"it begins with {text[:1]!r}, not with an object")
        described = strict_json.parse(text)
    except ValueError as error:
        raise _damage(path, f"its header cannot be read: {error}") from error
    return described


def _entry(fields: Any, data: int, size: int) -> Entry:
    """`data` is the file's first byte behind the header, `size` the whole file's."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        found = sorted(fields)[:8] if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"expected the fields data_offsets, dtype and shape, found {found!s:.400}")
    kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"dtype is {kind!r:.100}, expected one of {', '.join(DTYPES)}")
    if not is_shape(shape):
        rule = f"expected at most {MOST_DIMENSIONS} whole numbers of at least 0"
        raise ValueError(f"shape is {shape!r:.100}, {rule}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets are {offsets!r:.100}, expected a first byte and a last")
    start, stop = (data + offset for offset in offsets)
    if stop > size:
        raise ValueError(
            f"its values end at byte {stop} of a file of {size}; the file is cut short or its "
            "header wrong"
        )
    expected = math.prod(shape) * DTYPES[kind].itemsize
    if stop - start != expected:
        raise ValueError(f"{kind} {shape} takes {expected} bytes, data_offsets hold {stop - start}")
    return Entry(kind, tuple(shape), start, stop)


def is_shape(value: Any) -> bool:
    """Whether a value that stood in JSON is the shape of a tensor."""
    return _whole_numbers(value) and len(value) <= MOST_DIMENSIONS


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in value
    )


def _check_tiling(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """ValueError unless the tensors lie one behind the other, up to the last byte."""
    before, end = "the header", data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            how = "overlaps" if entry.start < end else "leaves a hole behind"
            raise _damage(
                path,
                f"{name[:200]} begins at byte {entry.start}, expected {end}; it {how} "
                f"{before[:200]}",
            )
        before, end = name, entry.stop
    if end != size:
        raise _damage(path, f"it has {size} bytes, expected {end}, where {before[:200]} ends")
