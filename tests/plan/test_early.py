"""What a compiler writes to files before machine code, against what it says when it is done."""

import threading
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from dsjax.plan import early
from dsjax.plan.buffers import memory

TEXT = """allocation 1: size 400, page 0, parameter 2, shape |f32[9]| at {}, maybe-live-out:
 value: <1 x @0> (size=400,offset=0): f32[10,10]
allocation 2: size 20, page 0, parameter 1, shape |s32[5]| at ShapeIndex {}:
allocation 3: size 8, page 0, output shape is |(f32[])|, maybe-live-out:
allocation 4: size 1000, page 0, preallocated-temp:
allocation 5: size 7000, color 1, page 0, preallocated-temp:
allocation 6: size 60, page 0, thread-local:
allocation 7: size 60, page 0, constant:
"""


def test_main_memory_alone_is_added_up():
    assert early.assigned(TEXT) == (420.0, 408.0, 400.0, 1000.0, 0.0)


def test_what_libtpu_writes_before_it_assigns_again_is_not_taken():
    """The order of its files, seen with libtpu 0.0.50: all of them twice, then a last one."""
    read = threading.Event()

    def compile(options: dict[str, str]) -> None:
        start = Path(options["xla_dump_to"]) / "module_0000.jit_step.after_optimizations"
        write(start, "_before_buffer_assignment.txt", "planned")
        for size in (400, 500):
            write(start, "-buffer-assignment.txt", TEXT.replace("400", str(size)))
            write(start, ".txt", f"{size}")
            time.sleep(1.5)
        write(start, "_after_buffer_assignment.txt", "finished")
        read.wait(60)

    program = mock.create_autospec(jax.stages.Lowered, instance=True)
    program.compile.side_effect = compile
    text, memory = early.planned(program)
    read.set()
    assert (text, memory.outputs) == ("finished", 508.0)


def write(start: Path, end: str, text: str) -> None:
    start.with_name(start.name + end).write_text(text)


def test_the_same_program_and_arguments_as_a_whole_compilation(uncached):
    def doubled(x, y):
        return x + x @ y, y.sum()

    shape = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    program = jax.jit(doubled, donate_argnums=0).lower(shape, shape)
    text, planned = early.planned(program)
    whole = program.compile()
    assert "dot(" in text
    told = memory(whole.memory_analysis())
    assert (planned.arguments, planned.aliased) == (told.arguments, told.aliased)
