"""What a conversion has done so far, on disk, so that the same command can continue it.

`DST/.conversion/plan.json` says what is being converted into what; each process appends a line of
JSON for each finished unit to a file of its own, `DST/.conversion/0-of-2.jsonl`. A line is written
after the unit's values, so a unit without a line is done again; whoever resumes checks the values
of a unit with a line by the facts in it. Lines go straight to the operating system: a killed
process loses none. What a machine that stopped or a full disk made of a line is no record: it is
passed over, and its unit done again.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dsjax.hf import files

FOLDER = ".conversion"
PLAN = "plan.json"
LOCK = "plan.lock"
FILE = re.compile(r"(\d+)-of-(\d+)\.jsonl")


def fingerprint(directory: Path) -> dict[str, Any]:
    """What a plan knows a Hugging Face directory by: its weights by size and time, JSON by CRC-32.

    Files of weights, wherever the index says they are, may not change while a conversion goes on.
    """
    marks: dict[str, Any] = {
        path.name: zlib.crc32(path.read_bytes())
        for path in sorted(directory.glob("*.json"))
        if path.is_file()
    }
    for name in sorted(files.listed(directory)):
        status = (directory / name).stat()
        marks[name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return marks


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all, also if several processes write it at once."""
    _replace(path, lambda file: file.write(content))


def replace_file(path: Path, source: Path) -> None:
    """Copies a file of any size whole or not at all."""
    with source.open("rb") as content:
        _replace(path, lambda file: shutil.copyfileobj(content, file))


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    # What a killed process leaves behind lies where nobody looks: in the conversion's own folder,
    # beside the file or up to two levels above.
    hidden = (parent / FOLDER for parent in path.parents[:3])
    folder = next((folder for folder in hidden if folder.is_dir()), path.parent)
    unfinished = folder / f"{path.name}.{secrets.token_hex(4)}.partial"
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Names in a directory, too, have to be told to stay."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begun(directory: Path) -> bool:
    """Whether a conversion has begun in `directory` (and perhaps ended: ask for its marker)."""
    return (directory / FOLDER / PLAN).is_file()


def check(directory: Path, plan: Mapping[str, Any]) -> None:
    """ValueError if `directory` holds anything but the (partial) result of this `plan`.

    A plan is whatever decides the result, as JSON: command, options, and `fingerprint` of the
    source. It writes nothing, so `--dry-run` may ask.
    """
    if not directory.exists():
        if directory.is_symlink():
            raise ValueError(f"{directory} is a link to nowhere; give a directory new or empty")
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a directory that is new or empty")
    if not begun(directory):
        found = [name for name in sorted(os.listdir(directory)) if name != FOLDER]
        if found:
            raise ValueError(
                f"{directory} is not empty (it holds {found[0]}) and no conversion began in it; "
                "give a directory that is new or empty"
            )
        return
    file = directory / FOLDER / PLAN
    try:
        before = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); delete {directory}") from error
    now = json.loads(json.dumps(plan))
    if before != now:
        known = before if isinstance(before, dict) else {}
        differing = sorted(k for k in known.keys() | now.keys() if known.get(k) != now.get(k))
        told = "; ".join(_difference(k, known.get(k), now.get(k)) for k in differing)
        raise ValueError(
            f"{directory} holds another conversion: {told}; repeat the first command, give "
            "another directory, or delete this one"
        )


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        inner = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        return _difference(f"{name} {inner[0]}", before.get(inner[0]), now.get(inner[0]))
    return f"{name} was {before!r:.200}, is {now!r:.200}"


class Journal:
    """The record of one conversion into `directory`, kept by process i of n (counted from 0).

    Making one makes the directory and claims the process's file; ValueError if `check` refuses or
    if that process is at work already. `done` maps the finished units of all processes to their
    facts.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Any], process: tuple[int, int] = (0, 1)):
        check(directory, plan)
        self.directory, self.folder, self.process = directory, directory / FOLDER, process
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_plan(plan)
        i, n = process
        self._path = self.folder / f"{i}-of-{n}.jsonl"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._claim()
            if n == 1:
                # Nobody else is at work: what lies here half written is a killed process's.
                for unfinished in self.folder.glob("*.partial"):
                    unfinished.unlink()
            self._cut_torn_line()
            self.done: dict[str, dict[str, Any]] = {}
            self.refresh()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def record(self, unit: str, **facts: Any) -> None:
        """Notes `unit` as finished. OSError if the line did not fit on the disk."""
        line = json.dumps({"unit": unit, **facts}).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self.done[unit] = facts

    def refresh(self) -> None:
        """Brings `done` up to date with what the other processes have finished."""
        for path in sorted(self.folder.iterdir()):
            if FILE.fullmatch(path.name):
                for line in path.read_bytes().split(b"\n")[:-1]:
                    facts = _facts(line)
                    if facts is not None:
                        self.done[facts.pop("unit")] = facts

    def sync(self) -> None:
        """Returns once every line is on the disk itself."""
        os.fsync(self._file)

    def _write_plan(self, plan: Mapping[str, Any]) -> None:
        """Of two that begin at once with different plans, the second to come is refused."""
        with (self.folder / LOCK).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not begun(self.directory):
                replace_bytes(self.folder / PLAN, json.dumps(plan, indent=1).encode())
            check(self.directory, plan)

    def _claim(self) -> None:
        i, n = self.process
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"process {i}/{n} is already at work in {self.directory}; wait for it or end it"
            ) from None
        for path in self.folder.iterdir():
            match = FILE.fullmatch(path.name)
            if match and int(match[2]) != n:
                _check_idle(path, f"{match[1]}/{match[2]}", n)

    def _cut_torn_line(self) -> None:
        content = self._path.read_bytes()
        os.ftruncate(self._file, content.rfind(b"\n") + 1)


def _check_idle(path: Path, process: str, n: int) -> None:
    """Shares of a work dealt to another number of processes would overlap."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"process {process} is still at work in {path.parent.parent}, so the work cannot "
                f"be dealt to {n} processes now; wait for it or end it"
            ) from None


def _facts(line: bytes) -> dict[str, Any] | None:
    """The record in a line, if it is one."""
    try:
        facts = json.loads(line)
    except ValueError:
        facts = None
    return facts if isinstance(facts, dict) and isinstance(facts.get("unit"), str) else None
