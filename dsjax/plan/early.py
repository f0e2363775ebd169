"""What TPU's compiler plans, read before it makes machine code: that takes most of the time.

The optimized program and the assignment of its memory are final by then, and XLA writes both to
files where `xla_dump_to` says. Nothing stops a compiler: use this in a process that ends with it.
"""

import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import jax

from dsjax.plan.buffers import Memory

PROGRAM = "*after_optimizations.txt"
# libtpu assigns buffers more than once, and writes the program again before and after all of it.
BEFORE = "*after_optimizations_before_buffer_assignment.txt"
AFTER = "*after_optimizations_after_buffer_assignment.txt"
ALLOCATIONS = "*after_optimizations-buffer-assignment.txt"
# Of the device's main memory: others have a color.
ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(?! color)(.*)", re.MULTILINE)


def planned(program: jax.stages.Lowered) -> tuple[str, Memory]:
    """The optimized program and its memory. Raises what the compiler raises."""
    errors = []

    def compiling(folder: str) -> None:
        try:
            program.compile({"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            errors.append(error)

    folder = tempfile.mkdtemp()
    thread = threading.Thread(target=compiling, args=(folder,), daemon=True)
    thread.start()
    # The program is written last; what has not grown for a while is whole.
    size, before = 0, -1
    while thread.is_alive() and not 0 < size == before:
        time.sleep(0.5)
        size, before = sum(path.stat().st_size for path in _last(Path(folder))), size
    try:
        if errors:
            raise errors[0]
        (text,), (allocations,) = (
            [path.read_text() for path in paths]
            for paths in (_last(Path(folder)), Path(folder).glob(ALLOCATIONS))
        )
    finally:
        # Dumps of a large program take hundreds of megabytes.
        shutil.rmtree(folder, ignore_errors=True)
    return text, assigned(allocations)


def _last(folder: Path) -> list[Path]:
    """The file that a compiler writes last before machine code, or none yet."""
    return list(folder.glob(AFTER if any(folder.glob(BEFORE)) else PROGRAM))


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
