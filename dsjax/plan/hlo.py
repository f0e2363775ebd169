"""Compiled programs as XLA prints them (`compiled.as_text()`), read into computations."""

import dataclasses
import math
import re

# Bits of an element; what is not listed (`token`, `opaque`) takes no room.
BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32},
    **{"s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
    **{"f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e8m0fnu": 8},
    **{"f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f4e2m1fn": 4},
}
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
TILE = re.compile(r"T\(([\d,]+)\)")
SPACE = re.compile(r"S\((\d+)\)")
HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
END = re.compile(r"^\}(, execution_thread=.*)?$")
COMMENT = re.compile(r"/\*.*?\*/")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
OPCODE = re.compile(r"([a-z][\w\-]*)\(")
OPERAND = re.compile(r"%([\w.\-]+(?:#\d+)?)")
CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OP_NAME = re.compile(r'\bop_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program: `shape`, and the `layout` as printed, with tiles and memory space."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> float:
        """Without padding."""
        return math.prod(self.shape) * BITS.get(self.dtype, 0) / 8

    @property
    def padded_bytes(self) -> float:
        """With the tail of each dimension filled up to whole tiles, as it lies on a TPU."""
        shape, tile = list(self.shape), TILE.search(self.layout)
        if tile and shape:
            sizes = [int(size) for size in tile.group(1).split(",")]
            order = [int(dim) for dim in self.layout.partition(":")[0].split(",")]
            for dim, size in zip(order, reversed(sizes), strict=False):
                shape[dim] = -(-shape[dim] // size) * size
        return math.prod(shape) * BITS.get(self.dtype, 0) / 8

    @property
    def space(self) -> int:
        """XLA's memory space; 0 is the device's main memory, 5 the host's."""
        found = SPACE.search(self.layout)
        return int(found.group(1)) if found else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `arrays` are the leaves of its result, `inside` is what stands in its brackets.

    `attributes` is the rest of the line: dimensions, called computations, metadata.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return OPERAND.findall(self.inside)

    @property
    def called(self) -> dict[str, str]:
        """Computations by what they are to this instruction: `body`, `condition`, `calls` ..."""
        return dict(CALLED.findall(self.attributes.partition("metadata=")[0]))

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional, in the order of its operands after the first."""
        if found := BRANCHES.search(self.attributes):
            return OPERAND.findall(found.group(1))
        called = self.called
        names = (called.get(name) for name in ("true_computation", "false_computation"))
        return [name for name in names if name is not None]

    @property
    def op_name(self) -> str:
        """Where it comes from in the source, as jax names it; empty if unknown."""
        found = OP_NAME.search(self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program. `num_devices` is the number that it was partitioned for."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int

    @property
    def is_tpu(self) -> bool:
        """Only TPU layouts have tiles, and only there space 1 is memory on the chip."""
        arrays = (a for i in self.computations[self.entry].instructions.values() for a in i.arrays)
        return any(TILE.search(array.layout) for array in arrays)


def arrays_of(text: str) -> tuple[Array, ...]:
    """All arrays that a printed type holds; a bounded dimension (`<=8`) counts in full."""
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<= ")) for size in shape.split(",") if size), layout)
        for dtype, shape, layout in ARRAY.findall(text)
    )


def parse(text: str) -> Module:
    """Reads a module; ValueError if there is no entry computation in it."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if header := HEADER.match(line):
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif name and END.match(line):
            computations[name] = _computation(name, lines)
            name = ""
        elif name and INSTRUCTION.match(line):
            lines.append(line)
        elif name and lines:
            # What a kernel says of itself may break the line.
            lines[-1] += line
    if entry not in computations:
        raise ValueError(
            f"no ENTRY computation in this text, which begins with {text[:60]!r}; "
            "give what compiled.as_text() returns"
        )
    head = text[: text.find("\n")]
    counts = [re.search(rf"{key}=(\d+)", head) for key in ("replica_count", "num_partitions")]
    num_devices = math.prod(int(count.group(1)) for count in counts if count)
    return Module(computations, entry, num_devices)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, texts, root = {}, {}, ""
    for line in lines:
        begin = INSTRUCTION.match(line)
        text = COMMENT.sub("", line[begin.end() :])
        instruction = _instruction(begin.group(2), text)
        for operand in instruction.operands:
            if "#" in operand and operand not in instructions:
                instructions[operand] = _element(operand, texts)
        texts[instruction.name] = text
        instructions[instruction.name] = instruction
        root = instruction.name if begin.group(1) else root
    return Computation(name, instructions, root)


def _element(name: str, texts: dict[str, str]) -> Instruction:
    """What TPU's compiler writes as `%tuple#2` where others have a get-tuple-element before."""
    whole, _, index = name.partition("#")
    text = texts[whole]
    depth, ends = 0, [0]
    for at, sign in enumerate(text[: _closed(text, 0)]):
        depth += (sign in "([{") - (sign in ")]}")
        if (sign == "," and depth == 1) or depth == 0:
            ends.append(at)
    start, end = ends[int(index) : int(index) + 2]
    arrays = arrays_of(text[start + 1 : end])
    return Instruction(name, "get-tuple-element", arrays, f"%{whole}", f", index={index}")


def _instruction(name: str, text: str) -> Instruction:
    """`TYPE opcode(OPERANDS), ATTRIBUTES`; a tuple's type stands in brackets itself."""
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    opcode = OPCODE.match(text, end + (text[end] == " "))
    assert opcode is not None, text[:200]
    close = _closed(text, opcode.end() - 1)
    inside, attributes = text[opcode.end() : close - 1], text[close:]
    return Instruction(name, opcode.group(1), arrays_of(text[:end]), inside, attributes)


def _closed(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"brackets do not close in {text[start : start + 80]!r}")
