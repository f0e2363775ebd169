"""What TPU's compiler plans, read before it makes machine code: that takes most of the time.

The optimized program and the assignment of its memory are final by then, and XLA writes both to
files where `xla_dump_to` says. Nothing stops a compiler but the end of its process: `apart`.
"""

import multiprocessing
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from dsjax.plan.buffers import Memory

PROGRAM = "*after_optimizations.txt"
# libtpu assigns buffers more than once, and writes the program again before and after all of it.
BEFORE = "*after_optimizations_before_buffer_assignment.txt"
AFTER = "*after_optimizations_after_buffer_assignment.txt"
ALLOCATIONS = "*after_optimizations-buffer-assignment.txt"
# Of the device's main memory: others have a color.
ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(?! color)(.*)", re.MULTILINE)


def apart(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in a process of its own, which ends when it has answered.

    Raises what it raises, and RuntimeError if the process dies.
    """
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_answering, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        answer, error = ours.recv()
    except EOFError as ended:
        process.join()
        raise RuntimeError(
            f"the compiler's process ended without a word (exit code {process.exitcode}); -9 is "
            "mostly this machine's memory being full"
        ) from ended
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return answer


def _answering(end: Connection, function: Callable, arguments: tuple) -> None:
    try:
        answer = function(*arguments), None
    except Exception as error:  # It is the parent's, who raises it.
        answer = None, error
    end.send(answer)
    # A compiler that is still at work would not let the process end: the parent does.
    time.sleep(60)


def planned(program: jax.stages.Lowered) -> tuple[str, Memory]:
    """The optimized program and its memory. Raises what compiling raises."""
    errors: list[Exception] = []

    def compiling(folder: str) -> None:
        try:
            program.compile({"xla_dump_to": folder})
        except Exception as error:  # A thread would only print it; it is raised below.
            errors.append(error)

    folder = tempfile.mkdtemp()
    thread = threading.Thread(target=compiling, args=(folder,), daemon=True)
    thread.start()
    # The program is written last; what has not grown for a while and has its end is whole.
    size, before = 0, -1
    while thread.is_alive() and not (0 < size == before and _are_whole(_last(Path(folder)))):
        time.sleep(0.5)
        size, before = sum(path.stat().st_size for path in _last(Path(folder))), size
    try:
        if errors:
            raise errors[0]
        return _only(_last(Path(folder))), assigned(_only(Path(folder).glob(ALLOCATIONS)))
    finally:
        # Dumps of a large program take hundreds of megabytes.
        shutil.rmtree(folder, ignore_errors=True)


def _last(folder: Path) -> list[Path]:
    """The file that a compiler writes last before machine code, or none yet."""
    return list(folder.glob(AFTER if any(folder.glob(BEFORE)) else PROGRAM))


def _are_whole(programs: list[Path]) -> bool:
    """Whether they are written to their ends: the entry, which stands last, is closed."""
    texts = (path.read_text(errors="replace") for path in programs)
    return all("\nENTRY " in text and text.rstrip().endswith("\n}") for text in texts)


def _only(paths: Iterable[Path]) -> str:
    """The text of the one file there should be."""
    found = list(paths)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise RuntimeError(
            "a compiler writes one optimized program and one assignment of its memory, and this "
            f"one wrote {names} for one of them; compile to the end, machine code and all, instead"
        )
    return found[0].read_text()


def assigned(text: str) -> Memory:
    """The sums of a buffer assignment as XLA prints it, a line for each allocation."""
    arguments = outputs = aliased = temporaries = 0.0
    for size, what in ALLOCATION.findall(text):
        is_argument, is_output = " parameter " in what, "maybe-live-out" in what
        arguments += float(size) * is_argument
        outputs += float(size) * is_output
        aliased += float(size) * (is_argument and is_output)
        temporaries += float(size) * ("preallocated-temp" in what)
    return Memory(arguments, outputs, aliased, temporaries)
