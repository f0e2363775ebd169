"""A Hugging Face directory to a converted one (`dsjax.convert.arrays`), tensor by tensor.

What can be checked is checked before anything is written. Each published tensor is then a unit of
work: its chunks are written under temporary names, renamed, and the unit is recorded in the journal
with the CRC-32 of its values. Who continues reads the recorded units back and does those again that
have another CRC-32. A process that has all of its units waits until they are on the disk itself and
records that; whoever finds this record of every process writes the marker.
"""

import dataclasses
import functools
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax.config import Model
from dsjax.convert import arrays, casting, journal, opened, selecting
from dsjax.convert.arrays import Chunk, Layout, Slot
from dsjax.convert.disk import check_free, write_all
from dsjax.convert.journal import Journal
from dsjax.convert.shards import WORKERS, small_files
from dsjax.hf import complete, files, fp8, names
from dsjax.hf.config import model_config
from dsjax.hf.tensors import Tensor, rows
from dsjax.progress import ByteProgress, in_bytes

# Read, checked and written at a time by each worker: it should stay in a processor's cache.
PIECE = 4 * 2**20


class Unit(NamedTuple):
    """The work that is done whole or again: rows of one published tensor into one chunk.

    `is_last`: it is the last one of its tensor.
    """

    name: str
    tensor: Tensor
    slot: Slot
    chunk: Chunk
    bytes: int
    is_last: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """What is imported: the part that was asked for, with its own config.json (`published`).

    `stored` are its tensors as they are in the source, `tensors` as they will be.
    """

    published: Mapping[str, Any]
    model: Model
    stored: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    layout: Layout
    dtypes: Mapping[str, np.dtype]

    @functools.cached_property
    def units(self) -> list[Unit]:
        """In the order of the source."""
        slots, units = self.layout.slots, []
        for name, tensor in self.tensors.items():
            if name not in slots:
                continue
            slot = slots[name]
            row = math.prod(slot.shape[1:]) * slot.array.dtype.itemsize
            for chunk in slot.chunks():
                size, is_last = (chunk.end - chunk.start) * row, chunk.end == slot.shape[0]
                units.append(Unit(name, tensor, slot, chunk, size, is_last))
        return units


def plan(
    source: Path,
    *,
    dtype: casting.Precision | None,
    layers: tuple[int, int] | None,
    mtp: bool | None,
) -> Import:
    """Opens and checks `source`, whole, and the part of it that is to be imported.

    ValueError says what is wrong with the source, or that it has no such part.
    """
    if opened.is_complete(source):
        raise ValueError(f"{source} is a converted checkpoint already")
    opened.check_finished(source)
    published = files.read_json(source / "config.json")
    model = model_config(published)
    stored = files.open_tensors(source)
    casting.check_source(stored, published)
    model = complete.without_absent_mtp(stored, model)
    if mtp and not model.mtp:
        raise ValueError(f"{source} holds no MTP layer; leave --mtp away")
    mtp = bool(model.mtp) and (layers is None if mtp is None else mtp)
    published = selecting.selected_config(published, layers, mtp=mtp)
    stored = selecting.selected_tensors(stored, model.num_layers, layers, mtp=mtp)
    fp8.check_scales(stored)
    tensors: Mapping[str, Tensor] = stored
    if dtype is not None:
        published = casting.recast_config(published, dtype)
        tensors = casting.recast(stored, dtype, ue8m0=casting.has_ue8m0(published))
    model = model_config(published)
    dtypes = arrays.array_dtypes(model, tensors)
    return Import(
        published=published,
        model=model,
        stored=stored,
        tensors=tensors,
        layout=arrays.layout(model, dtypes),
        dtypes=dtypes,
    )


def import_checkpoint(
    source: Path,
    destination: Path,
    *,
    dtype: casting.Precision | None = None,
    layers: tuple[int, int] | None = None,
    mtp: bool | None = None,
    process: tuple[int, int] = (0, 1),
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Converts `source`, or finishes what an earlier call began; does the work of process i of n.

    `mtp=None` takes the MTP layers along if all layers are. ValueError for a source or destination
    that does not fit, before anything is written; OSError if the disk is full or fails. `dry_run`
    checks all but the weights, tells the plan and writes nothing.
    """
    its_plan = plan(source, dtype=dtype, layers=layers, mtp=mtp)
    record = {
        "command": "import",
        "dtype": dtype,
        "layers": layers,
        "mtp": mtp,
        "source": journal.fingerprint(source),
    }
    journal.check(destination, record)
    if opened.is_complete(destination):
        say(f"{destination} is complete already")
        return
    units = its_plan.units
    total = sum(unit.bytes for unit in units)
    say(f"{len(its_plan.layout.slots):,} tensors, {in_bytes(total)}, in {len(units):,} files")
    if dry_run:
        if not journal.begun(destination):
            check_free(destination, total)
        say("dry run: nothing was written")
        return
    if not journal.begun(destination):
        complete.check_copies(its_plan.stored, names.copies(its_plan.model))
        check_free(destination, total)
    with Journal(destination, record, process) as done:
        prepare(its_plan, destination)
        mine = share(units, process)
        there = all((destination / unit.chunk.file).is_file() for unit in mine)
        if own(process) not in done.done or not there:
            work(mine, destination, done)
            os.sync()
            done.record(own(process))
            done.sync()
        done.refresh()
        if any(own((i, process[1])) not in done.done for i in range(process[1])):
            say(f"process {process[0]}/{process[1]} has done its share; others have not yet")
            return
        finish(its_plan, source, destination, done)
    say(f"complete: {destination}")


def own(process: tuple[int, int]) -> str:
    """The journal's name of the whole work of a process."""
    return f"process {process[0]}/{process[1]}"


def prepare(its_plan: Import, destination: Path) -> None:
    """Everything in `model` but the chunks; every process writes the same."""
    folder = destination / arrays.MODEL
    for name, array in its_plan.layout.arrays.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        _write_json(folder / name / "zarr.json", array.metadata())
    for name, content in arrays.orbax_metadata(its_plan.layout.arrays).items():
        _write_json(folder / name, content)


def _write_json(path: Path, content: Any) -> None:
    journal.replace_bytes(path, json.dumps(content, indent=1).encode() + b"\n")


def work(mine: Sequence[Unit], destination: Path, done: Journal) -> None:
    """Every one of the units that is not there yet."""
    check_free(destination, sum(unit.bytes for unit in mine if unit.chunk.file not in done.done))
    stop = threading.Event()

    def do(unit: Unit) -> None:
        recorded = done.done.get(unit.chunk.file)
        if recorded is None or recorded["crc32"] != stored_crc(unit, destination):
            crc = write(unit, destination, stop)
            if stop.is_set():
                return
            done.record(unit.chunk.file, crc32=crc)
        bar.advance(unit.bytes, tensors=int(unit.is_last))

    with (
        ByteProgress(
            "import",
            tensors=sum(unit.is_last for unit in mine),
            num_bytes=sum(unit.bytes for unit in mine),
        ) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        if kept := sum(unit.chunk.file in done.done for unit in mine):
            bar.say(f"{kept:,} of {len(mine):,} pieces are there already and only read again")
        try:
            for _ in pool.map(do, mine):
                pass
        except BaseException:
            stop.set()
            raise


def finish(its_plan: Import, source: Path, destination: Path, done: Journal) -> None:
    """The small files, then the marker. ValueError if a chunk has gone since it was written."""
    arrays.tensors_in(destination, its_plan.layout)
    hub = destination / arrays.HUB
    hub.mkdir(exist_ok=True)
    for name, path in small_files(source).items():
        journal.replace_file(hub / name, path)
    _write_json(hub / "config.json", its_plan.published)
    units, digest = its_plan.units, 0
    for unit in sorted(units, key=lambda unit: unit.chunk.file):
        recorded = done.done.get(unit.chunk.file)
        crc = recorded["crc32"] if recorded else stored_crc(unit, destination)
        told = f"{unit.chunk.file} {crc}\n"
        digest = zlib.crc32(told.encode(), digest)
    facts = {
        "source": source.resolve().name,
        "tensors": len(its_plan.layout.slots),
        "bytes": sum(unit.bytes for unit in units),
        # Of the CRC-32 of every chunk: two checkpoints of one model are told apart by it.
        "crc32": digest,
    }
    opened.write_marker(destination, its_plan.model, its_plan.dtypes, facts)


def share(units: Sequence[Unit], process: tuple[int, int]) -> list[Unit]:
    """The units of process i of n: neighbours, about as many bytes as any other has."""
    i, n = process
    sizes = np.array([unit.bytes for unit in units])
    ends = np.cumsum(sizes)
    # A unit belongs to whom its middle byte falls to.
    owners = (2 * ends - sizes) * n // (2 * max(int(ends[-1]), 1))
    return [unit for unit, owner in zip(units, owners, strict=True) if owner == i]


def write(unit: Unit, directory: Path, stop: threading.Event) -> int:
    """Stores a unit in its chunk; the CRC-32 of its values, which are not on the disk yet.

    Ends early once `stop` is set. OSError names the file that could not be written.
    """
    path = directory / unit.chunk.file
    unfinished = path.with_name(path.name + ".partial")
    crc = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb", buffering=0) as file:
        offset = 0
        for values in _values(unit, unit.tensor):
            if stop.is_set():
                return crc
            crc = zlib.crc32(values, crc)
            write_all(file.fileno(), memoryview(values), offset, path)
            offset += values.size
        if offset < unit.slot.array.chunk_bytes:
            # The last chunk of a tensor is as long as the others, filled up with zeros.
            file.truncate(unit.slot.array.chunk_bytes)
    os.replace(unfinished, path)
    return crc


def stored_crc(unit: Unit, directory: Path) -> int | None:
    """The CRC-32 of a unit's values as they are in its chunk; None if they are not all there."""
    crc, tensor = 0, arrays.InChunks(unit.name, unit.slot, directory)
    try:
        for values in _values(unit, tensor):
            crc = zlib.crc32(values, crc)
    except (OSError, ValueError):
        return None
    return crc


def _values(unit: Unit, tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes of the rows of `tensor` that the unit is about, a piece at a time."""
    for index in rows(tensor, unit.chunk.start, unit.chunk.end, PIECE):
        yield np.ascontiguousarray(tensor[index]).reshape(-1).view(np.uint8)
