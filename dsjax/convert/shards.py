"""Writes a Hugging Face directory: shards that grow in place, small files, and `config.json` last.

A shard is planned to the byte before anything is written. It grows in `NAME.partial`, each tensor
at its own offset, and the journal gets a line with the tensor's CRC-32 once its values are written.
Whoever continues reads those tensors back, keeps what has the CRC, and writes the rest. A finished
shard is forced to the disk before it is renamed, so a file under its final name is whole.

No loader takes an unfinished directory for complete: all of them begin with `config.json`, which is
written last, after every shard of every process, the index and the small files. It is the marker.
"""

import concurrent.futures
import dataclasses
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.convert.disk import check_free, write_all
from dsjax.convert.journal import Journal, replace_bytes, replace_file, sync_directory
from dsjax.hf.files import INDEX, SINGLE
from dsjax.hf.safetensors_file import KINDS, Entry
from dsjax.hf.tensors import Tensor, num_bytes, rows
from dsjax.progress import ByteProgress

MARKER = "config.json"
# Read, computed and written at a time. With one such piece for each worker, memory does not depend
# on the size of a tensor.
PIECE = 1 << 25
WORKERS = 4
# Files of a source that are no business of the copy: weights, and what is written anew.
NOT_PASSED = {
    *(".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".partial", ".pt", ".pth"),
    ".safetensors",
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name, its header (with the length in front), and what it describes."""

    name: str
    header: bytes
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        return max([len(self.header), *(entry.stop for entry in self.entries.values())])


def plan(tensors: Mapping[str, Tensor], shard_size: int) -> list[Shard]:
    """`tensors`, in their order, in files of at most `shard_size` bytes of values each.

    A tensor larger than that gets a file of its own.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = num_bytes(tensor)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [SINGLE]
    return [
        _shard(file, {name: tensors[name] for name in group})
        for file, group in zip(names, groups, strict=True)
    ]


def _shard(file: str, tensors: Mapping[str, Tensor]) -> Shard:
    # The widest types first, so that every tensor begins at a multiple of its type's size.
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    fields, stop = {}, 0
    for name in ordered:
        start, stop = stop, stop + num_bytes(tensors[name])
        fields[name] = {
            "dtype": KINDS[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **fields}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    entries = {
        name: Entry(
            field["dtype"],
            tuple(field["shape"]),
            *(len(header) + offset for offset in field["data_offsets"]),
        )
        for name, field in fields.items()
    }
    return Shard(file, header, {name: entries[name] for name in tensors})


def share(shards: Sequence[Shard], process: tuple[int, int]) -> list[Shard]:
    """The shards of process i of n: whole files, so that each process has about as many bytes."""
    i, n = process
    loads = [0] * n
    mine = []
    for shard in sorted(shards, key=lambda shard: (-shard.size, shard.name)):
        lightest = loads.index(min(loads))
        loads[lightest] += shard.size
        if lightest == i:
            mine.append(shard)
    return sorted(mine, key=lambda shard: shard.name)


def check_space(directory: Path, shards: Iterable[Shard]) -> None:
    """OSError if the disk has no room for what is still to be written."""
    needed = 0
    for shard in shards:
        if not (directory / shard.name).exists():
            partial = _partial(directory, shard)
            needed += shard.size - (_allocated(partial) if partial.exists() else 0)
    check_free(directory, needed)


def _allocated(path: Path) -> int:
    """Bytes the file takes on the disk; it may have holes."""
    status = path.stat()
    return min(status.st_blocks * 512, status.st_size)


def write(
    shards: Sequence[Shard],
    tensors: Mapping[str, Tensor],
    journal: Journal,
    *,
    what: str,
) -> bool:
    """Writes this process's share of `shards`; whether all shards of all processes are there now.

    `tensors` are read in pieces, by several threads; ask `check_space` before. OSError names the
    file that could not be written; what was finished stays, and the same call continues.
    """
    mine = share(shards, journal.process)
    directory = journal.directory
    names = [name for shard in mine for name in shard.entries]
    kept = {
        name
        for shard in mine
        for name in (
            shard.entries
            if (directory / shard.name).exists()
            else _kept(directory, shard, journal.done)
        )
    }
    sizes = {name: num_bytes(tensors[name]) for name in names}
    with ByteProgress(
        what,
        tensors=len(names),
        num_bytes=sum(sizes.values()),
        done_tensors=len(kept),
        done_bytes=sum(sizes[name] for name in kept),
    ) as bar:
        if kept:
            bar.say(f"{len(kept):,} of {len(names):,} tensors are there already")
        _Writer(directory, tensors, journal, bar, kept).run(mine)
    return all((directory / shard.name).exists() for shard in shards)


def _partial(directory: Path, shard: Shard) -> Path:
    return directory / f"{shard.name}.partial"


def _kept(directory: Path, shard: Shard, done: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The tensors in an unfinished shard whose values are as the journal says."""
    path = _partial(directory, shard)
    if not path.exists():
        return
    with path.open("rb", buffering=0) as file:
        for name, entry in shard.entries.items():
            if name in done and _crc(file, entry) == done[name].get("crc32"):
                yield name


def _crc(file: Any, entry: Entry) -> int:
    """CRC-32 of the part of a file where `entry` lies, of less if the file ends before."""
    crc, offset = 0, entry.start
    while part := os.pread(file.fileno(), min(PIECE, entry.stop - offset), offset):
        crc = zlib.crc32(part, crc)
        offset += len(part)
    return crc


class _Writer:
    """Threads that fill shards: one tensor is one task, the end of a shard is another."""

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, Tensor],
        journal: Journal,
        bar: ByteProgress,
        kept: set[str],
    ):
        self._directory, self._tensors, self._journal = directory, tensors, journal
        self._bar, self._kept, self._stop = bar, kept, threading.Event()

    def run(self, shards: Sequence[Shard]) -> None:
        # Forcing a shard to the disk takes a while, in which the next one can be filled.
        with (
            concurrent.futures.ThreadPoolExecutor(WORKERS) as fillers,
            concurrent.futures.ThreadPoolExecutor(1) as finisher,
        ):
            ends: list[concurrent.futures.Future[None]] = []
            try:
                for shard in shards:
                    if (self._directory / shard.name).exists():
                        continue
                    path = _partial(self._directory, shard)
                    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                    tasks = [
                        fillers.submit(self._fill, file, path, name, entry)
                        for name, entry in shard.entries.items()
                        if name not in self._kept
                    ]
                    ends.append(finisher.submit(self._finish, shard, file, tasks))
                    for end in ends[-2:-1]:
                        end.result()
                for end in ends:
                    end.result()
            except BaseException:
                self._stop.set()
                raise

    def _fill(self, file: int, path: Path, name: str, entry: Entry) -> None:
        tensor, offset, crc = self._tensors[name], entry.start, 0
        try:
            for index in rows(tensor, 0, tensor.shape[0], PIECE) if tensor.shape else [()]:
                if self._stop.is_set():
                    return
                values = np.ascontiguousarray(tensor[index]).reshape(-1).view(np.uint8)
                write_all(file, memoryview(values), offset, path)
                crc, offset = zlib.crc32(values, crc), offset + values.size
                self._bar.advance(values.size)
            self._journal.record(name, crc32=crc)
        except BaseException:
            self._stop.set()
            raise
        self._bar.advance(0, tensors=1)

    def _finish(
        self, shard: Shard, file: int, tasks: Sequence[concurrent.futures.Future[None]]
    ) -> None:
        path = _partial(self._directory, shard)
        try:
            concurrent.futures.wait(tasks)
            for task in tasks:
                task.result()
            if self._stop.is_set():
                return
            write_all(file, memoryview(shard.header), 0, path)
            os.ftruncate(file, shard.size)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(path, self._directory / shard.name)
        sync_directory(self._directory)


def finish(
    directory: Path,
    shards: Sequence[Shard],
    config: Mapping[str, Any],
    passed: Mapping[str, Path],
) -> None:
    """Index, small files (`passed`: name to where it is now), and `config.json`, the marker, last.

    Called when all shards are there; several processes may do so at once.
    """
    for name, source in passed.items():
        replace_file(directory / name, source)
    if [shard.name for shard in shards] != [SINGLE]:
        places = {name: shard.name for shard in shards for name in shard.entries}
        total = sum(e.stop - e.start for shard in shards for e in shard.entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        replace_bytes(directory / INDEX, json.dumps(index, indent=2).encode() + b"\n")
    replace_bytes(directory / MARKER, json.dumps(config, indent=2).encode() + b"\n")


def is_complete(directory: Path) -> bool:
    return (directory / MARKER).is_file()


def small_files(source: Path) -> dict[str, Path]:
    """The files to pass through: tokenizer, generation config, licence and the like."""
    return {
        path.name: path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in NOT_PASSED
        and path.name not in (MARKER, INDEX)
    }
