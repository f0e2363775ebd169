"""Numbered documents over many files, and the fixed split into training and held-out ones."""

import hashlib
import json
import os
import sysconfig
from pathlib import Path

import numpy as np

from dsjax.data.files import JsonLines, ParquetRows, WholeFile, row_group_cache

# Third-party packages and tests; what is left is the library itself.
# `pydoc_data` is one 800 KB file of help texts in string literals, not source anyone wrote.
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "__pycache__",
}


class Unreadable(ValueError):
    """A document that is no text, or that is gone; the message says where it stood."""


def mending(anew: str | None) -> str:
    """What to do about one. `anew`: the keys of a new run from the newest checkpoint, if any."""
    if anew is None:
        return "Mend or remove it, and repeat the command"
    return (
        "Mended with its file as long as before (spaces over what is broken), the same command "
        "continues. Any other change makes other data, in which no checkpoint has a place: begin "
        f"a new run from the weights of the last one, {anew}"
    )


class Documents:
    """All documents of some files, numbered through in the order of the files."""

    def __init__(self, files: list[WholeFile | JsonLines | ParquetRows]):
        self._files = files
        self._starts = np.cumsum([0, *(len(file) for file in files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, document: int) -> bytes:
        """Unreadable if its file does not hold it any more, or holds no text there."""
        file, index = self._find(document)
        try:
            return file.read(index)
        except (ValueError, OSError) as error:
            told = str(error)
            # Errors of the Parquet library do not name the file.
            where = "" if str(file.path) in told else f"{file.locate(index)}: "
            raise Unreadable(where + told) from error

    def locate(self, document: int) -> str:
        """Where a person finds it: "path:byte_offset", or "path:row 7" in Parquet."""
        file, index = self._find(document)
        return file.locate(index)

    def held_out(self, share: float) -> np.ndarray:
        """Boolean mask [documents], True for about `share` of them.

        Decided by a hash of the file's path inside its folder and the document's place in it, so
        a document keeps its side when files are added, moved to another machine or read in
        another order.
        """
        limit = np.uint64(share * 2.0**64)
        hashes = [_hashes(file.name, len(file)) for file in self._files]
        return np.concatenate([np.zeros(0, np.uint64), *hashes]) < limit

    def fingerprint(self) -> str:
        """Changes when a file appears, vanishes, is renamed, or changes its size or length."""
        listing = [(file.name, file.path.stat().st_size, len(file)) for file in self._files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]

    def _find(self, document: int) -> tuple[WholeFile | JsonLines | ParquetRows, int]:
        if not 0 <= document < len(self):
            raise ValueError(
                f"there is no document {document}; they are numbered from 0 to {len(self) - 1}"
            )
        number = int(np.searchsorted(self._starts, document, side="right")) - 1
        return self._files[number], document - int(self._starts[number])


def _hashes(name: str, count: int) -> np.ndarray:
    """Evenly spread uint64 per document: SplitMix64 (Steele et al. 2014) seeded by the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8])
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def standard_library_documents() -> Documents:
    """Python's own modules, one document per `.py` file. ValueError if there are no sources."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        WholeFile(path, name) for name, path in _walk(root, NOT_LIBRARY) if path.suffix == ".py"
    ]
    if not files:
        raise ValueError(
            f"this Python has no library sources under {root}; "
            "use another Python, or a folder of text (data=Files)"
        )
    return Documents(files)


def folder_documents(path: str, text_field: str) -> Documents:
    """Every `.jsonl`, `.parquet` and `.txt` below `path`. ValueError if there is none."""
    root = Path(path).expanduser()
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"data.path={path!r} {problem}; it must be a folder of documents")
    row_group = row_group_cache()
    files = []
    for name, file in _walk(root, set()):
        match file.suffix.lower():
            case ".txt":
                files.append(WholeFile(file, name))
            case ".jsonl":
                files.append(JsonLines(file, name, text_field))
            case ".parquet":
                files.append(ParquetRows(file, name, text_field, row_group))
    if not files:
        raise ValueError(f"data.path={path!r} holds no .jsonl, .parquet or .txt file at any depth")
    return Documents(files)


def _walk(root: Path, without: set[str]) -> list[tuple[str, Path]]:
    """(path inside `root` with forward slashes, full path) of every file, sorted by the former."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without]
        paths = [Path(folder, name) for name in names]
        found.extend((path.relative_to(root).as_posix(), path) for path in paths)
    return sorted(found)
