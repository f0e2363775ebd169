"""What a compiler writes to files before machine code, against what it says when it is done."""

import os
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from dsjax.plan import early
from dsjax.plan.buffers import Memory, memory

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


def program_of(name: str) -> str:
    """As XLA writes it, its entry last."""
    return (
        f"HloModule {name}\n\n%body (x: f32[]) -> f32[] {{\n}}\n\nENTRY %main () -> () {{\n}}\n\n"
    )


def compiled_by(compile) -> tuple[str, Memory]:
    program = mock.create_autospec(jax.stages.Lowered, instance=True)
    program.compile.side_effect = compile
    return early.planned(program)


def test_what_libtpu_writes_before_it_assigns_again_is_not_taken():
    """The order of its files, seen with libtpu 0.0.50: all of them twice, then a last one."""
    read = threading.Event()

    def compile(options: dict[str, str]) -> None:
        start = Path(options["xla_dump_to"]) / "module_0000.jit_step.after_optimizations"
        write(start, "_before_buffer_assignment.txt", program_of("planned"))
        for size in (400, 500):
            write(start, "-buffer-assignment.txt", TEXT.replace("400", str(size)))
            write(start, ".txt", program_of(f"{size}"))
            time.sleep(1.5)
        write(start, "_after_buffer_assignment.txt", program_of("finished"))
        read.wait(60)

    text, memory = compiled_by(compile)
    read.set()
    assert (text, memory.outputs) == (program_of("finished"), 508.0)


@pytest.mark.parametrize("end", ["ENTRY", " () ->"], ids=repr)
def test_a_program_whose_writing_halts_is_waited_for(end):
    whole, read = program_of("slow"), threading.Event()

    def compile(options: dict[str, str]) -> None:
        start = Path(options["xla_dump_to"]) / "module_0000.jit_step.after_optimizations"
        write(start, "-buffer-assignment.txt", TEXT)
        write(start, ".txt", whole[: whole.find(end)])
        # Longer than two looks at the size are apart.
        time.sleep(1.7)
        write(start, ".txt", whole)
        read.wait(60)

    text, _ = compiled_by(compile)
    read.set()
    assert text == whole


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("no memory"), TypeError("no such")])
def test_whatever_compiling_raises_is_raised(error):
    def compile(options: dict[str, str]) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        compiled_by(compile)


def test_a_compiler_that_writes_no_files_is_told_of():
    with pytest.raises(RuntimeError, match=r"this one wrote none .*compile to the end"):
        compiled_by(lambda options: None)


def write(start: Path, end: str, text: str) -> None:
    start.with_name(start.name + end).write_text(text)


def test_what_is_done_apart_is_answered_or_raised():
    assert early.apart(divmod, 7, 2) == (3, 1)
    with pytest.raises(ValueError, match="invalid literal"):
        early.apart(int, "x")
    with pytest.raises(RuntimeError, match=r"ended without a word \(exit code 3\)"):
        early.apart(os._exit, 3)


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
