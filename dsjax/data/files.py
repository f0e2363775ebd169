"""The three kinds of file documents come from, each read at random without loading it whole.

All have `name` (path inside its folder), `len()`, `read(index)` giving one document as bytes, and
`locate(index)` giving the place a person can open: "path:byte_offset", or "path:row 7".
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SCAN_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class WholeFile:
    """A file that is one document, its bytes taken as they are."""

    path: Path
    name: str

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> bytes:
        del index
        return self.path.read_bytes()

    def locate(self, index: int) -> str:
        del index
        return f"{self.path}:0"


class JsonLines:
    """A `.jsonl` file: one JSON object per line, its text under `text_field`; empty lines are none.

    Only where lines begin and end is kept in memory (16 bytes a document), found once on opening.
    """

    def __init__(self, path: Path, name: str, text_field: str):
        self.path = path
        self.name = name
        self._text_field = text_field
        self._spans = _line_spans(path)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, index: int) -> bytes:
        """ValueError with file and line if the line is no UTF-8 JSON object with that text."""
        start, end = self._spans[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._line(start)} is not UTF-8: {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self._line(start)} is not valid JSON ({error}); "
                "every line of a .jsonl file must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{self._line(start)} holds a JSON {type(record).__name__}; "
                f"it must be an object with the text under {self._text_field!r}"
            )
        if self._text_field not in record:
            raise ValueError(
                f"{self._line(start)} has no field {self._text_field!r}; its fields are "
                f"{sorted(record)}. Set data.text_field to the one that holds the text"
            )
        text = record[self._text_field]
        if not isinstance(text, str):
            raise ValueError(
                f"{self._line(start)}: field {self._text_field!r} is {type(text).__name__}, "
                "it must be a string"
            )
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self._line(start)}: {self._text_field!r} holds half a surrogate pair, which is "
                f"no text ({error}); repair or remove the line"
            ) from error

    def locate(self, index: int) -> str:
        return f"{self.path}:{self._spans[index, 0]}"

    def _line(self, start: int) -> str:
        """`path:line`, counted from 1 as editors do. For errors: reads the file up to there."""
        newlines = 0
        with self.path.open("rb") as file:
            while start > 0:
                chunk = file.read(min(start, SCAN_BYTES))
                newlines += chunk.count(b"\n")
                start -= len(chunk)
        return f"{self.path}:{newlines + 1}"


def _line_spans(path: Path) -> np.ndarray:
    """Byte range [start, end) of every non-empty line, int64 of shape [lines, 2]."""
    found, size = [], 0
    with path.open("rb") as file:
        while chunk := file.read(SCAN_BYTES):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        ends = np.concatenate([*found, [size]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
        filled = ends > starts
        for line in np.flatnonzero(ends - starts == 1):
            file.seek(starts[line])
            filled[line] = file.read(1) != b"\r"
    return np.stack([starts, ends], axis=1)[filled]


class ParquetRows:
    """A `.parquet` file: one document per row, its text in the column `text_field`.

    A row is reached by reading its row group through `row_group`, a cached `read_row_group` shared
    by all files of a folder. Shuffled reading is therefore quick only where row groups are small
    (about a thousand rows); rewrite files with larger ones.
    """

    def __init__(self, path: Path, name: str, text_field: str, row_group: Callable[..., Any]):
        """ValueError if the file is no Parquet, if `text_field` is not a column of strings, or if
        pyarrow is not installed.
        """
        self.path = path
        self.name = name
        self._text_field = text_field
        self._row_group = row_group
        rows = _row_group_sizes(path, text_field)
        self._starts = np.cumsum([0, *rows])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> bytes:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        column = self._row_group(self.path, group, self._text_field)
        text = column[index - int(self._starts[group])].as_py()
        if text is None:
            raise ValueError(
                f"{self.locate(index)}: column {self._text_field!r} is null; "
                "drop such rows or give them text"
            )
        return text.encode("utf-8")

    def locate(self, index: int) -> str:
        return f"{self.path}:row {index}"


def row_group_cache() -> Callable[..., Any]:
    """Reads (path, row group, column) and keeps one for every stream of rows."""
    return functools.lru_cache(maxsize=16)(_read_row_group)


def _read_row_group(path: Path, group: int, column: str):
    with _parquet(path).ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _row_group_sizes(path: Path, text_field: str) -> list[int]:
    parquet = _parquet(path)
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    if text_field not in schema.names:
        raise ValueError(
            f"{path} has no column {text_field!r}; its columns are {sorted(schema.names)}. "
            "Set data.text_field to the one that holds the text"
        )
    kind = schema.field(text_field).type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise ValueError(f"{path}: column {text_field!r} is of type {kind}, it must hold strings")
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} cannot be read without pyarrow ({error}): pip install pyarrow"
        ) from error
    return pyarrow.parquet
