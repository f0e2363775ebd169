"""The memory that a compiled program needs, or the compiler's word that there is not enough."""

import re
from typing import Any, NamedTuple

from dsjax.plan.hlo import Computation, Module, parse
from dsjax.plan.moved import HOST

NUMBER = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1, "B": 1}
SIZE = r"([\d.]+)([KMGT]?)i?B?"
# "... memory required for HLO temporaries (37.62G) exceeds available HBM (31.24G)", and what
# other compilers and versions say of the same.
REQUIRED = re.compile(rf"\({SIZE}\) exceeds available \w+ \({SIZE}\)")
USED = re.compile(rf"Used {SIZE} of {SIZE} \w+")
LISTED = re.compile(
    rf"Size: {SIZE}\s*\n(?:\s*Operator: [^\n]*?op_name=\"(?P<op>[^\"]*)\"[^\n]*\n)?"
    r"(?:\s*X[LA]{2} [Ll]abel: [^\n]*\n)?(?:\s*Shape: (?P<shape>\S+))?"
)
# Results that are no memory of their own.
SHARED = {"get-tuple-element", "tuple", "bitcast", "while", "conditional", "after-all", "call"}
BLANK = re.compile(r'^broadcast |custom_call_target="AllocateBuffer"')


class Memory(NamedTuple):
    """Bytes of one device. `peak` is what the compiler's plan has alive at most; 0 if unknown.

    `aliased` outputs take the place of arguments (a donated state).
    """

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    peak: float = 0.0

    @property
    def total(self) -> float:
        """What a run allocates: arguments, outputs with a place of their own, temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


class Buffer(NamedTuple):
    """An array of the program and where it comes from."""

    bytes: float
    shape: str
    op_name: str


class OutOfMemory(NamedTuple):
    """The compiler's refusal: bytes that it counted, bytes that there are, the largest buffers."""

    needed: float
    available: float
    largest: tuple[Buffer, ...]


def memory(stats: Any) -> Memory:
    """From `compiled.memory_analysis()`."""
    return Memory(
        float(stats.argument_size_in_bytes),
        float(stats.output_size_in_bytes),
        float(stats.alias_size_in_bytes),
        float(stats.temp_size_in_bytes),
        float(getattr(stats, "peak_memory_in_bytes", 0)),
    )


def largest(text: str, number: int = 3) -> list[Buffer]:
    """The largest arrays in main memory that the program `text` gets or makes, tiles filled up.

    No backend tells its plan of the memory, so these are arrays of the entry and of the bodies of
    loops and branches; not all of them need be alive at once. One of each shape is named, by where
    it is first made rather than allocated.
    """
    module = parse(text)
    made: dict[str, Buffer] = {}
    blank: dict[str, Buffer] = {}
    for computation in _running(module):
        for instruction in computation.instructions.values():
            if instruction.opcode in SHARED or instruction.opcode.endswith(("-done", "-start")):
                continue
            if instruction.opcode == "parameter" and computation.name != module.entry:
                continue
            is_blank = BLANK.search(f"{instruction.opcode} {instruction.attributes}")
            target = made if is_blank is None else blank
            for array in instruction.arrays:
                if array.space == HOST or (module.is_tpu and array.space):
                    continue
                buffer = Buffer(
                    array.padded_bytes, str(array), instruction.op_name or instruction.name
                )
                target.setdefault(str(array), buffer)
    found = (blank | made).values()
    return sorted(found, key=lambda buffer: (-buffer.bytes, buffer))[:number]


def _running(module: Module) -> list[Computation]:
    """The entry and, from it, every body of a loop, branch or call, but no fusion or reducer."""
    names, result = [module.entry], []
    while names:
        computation = module.computations[names.pop()]
        result.append(computation)
        for instruction in computation.instructions.values():
            names += instruction.branches
            if instruction.opcode in ("while", "call"):
                called = instruction.called
                names.append(called.get("body") or called["to_apply"])
    return list({one.name: one for one in result}.values())


def out_of_memory(message: str) -> OutOfMemory | None:
    """Reads a compiler's error; None if it is about something else."""
    found = REQUIRED.search(message) or USED.search(message)
    if found is None:
        return None
    needed, needed_unit, available, available_unit = found.groups()
    buffers = tuple(
        Buffer(_bytes(one.group(1), one.group(2)), one["shape"] or "", one["op"] or "")
        for one in LISTED.finditer(message)
    )
    return OutOfMemory(_bytes(needed, needed_unit), _bytes(available, available_unit), buffers)


def _bytes(number: str, unit: str) -> float:
    return float(number) * NUMBER[unit]
