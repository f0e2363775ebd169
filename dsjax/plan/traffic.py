"""What collectives send, by the usual formulas."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from dsjax.plan.groups import groups, pairs
from dsjax.plan.hlo import Computation, Instruction

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# Between slices a TPU program sends and receives through the hosts, and says what it stands for.
TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# "{1,2}x{0:3}": devices 0 to 3 of slices 1 and 2; {{100000,200000},...}: groups of devices, whose
# numbers begin with the slice.
TARGET = re.compile(r'_xla_megascale_target="?\{+([\d,:]+)\}')
FIRST_OF_SLICE = 100_000


class Traffic(NamedTuple):
    """Collectives of one kind; bytes are of one device, the one that sends most.

    `ops` stand in the program, and run `calls` times. `payload` are the bytes that they work on:
    an all-gather's result, every other one's operand. `near` is sent to devices of the same slice
    or node, `far` to others.
    """

    ops: float = 0
    calls: float = 0
    payload: float = 0
    near: float = 0
    far: float = 0

    def plus(self, other: "Traffic", times: int = 1) -> "Traffic":
        """`other` added as it comes about in a body that runs `times` times."""
        sums = Traffic(*(mine + times * its for mine, its in zip(self, other, strict=True)))
        return sums._replace(ops=self.ops + other.ops)


def kind(instruction: Instruction) -> str | None:
    """Which collective begins here; what ends one (`-done`) or carries it on is none."""
    opcode = instruction.opcode.removesuffix("-start")
    if instruction.opcode == "send" and (found := TRANSFER.search(instruction.attributes)):
        name = found.group(1).lower().replace("_", "-")
        return name if name in KINDS else "collective-permute"
    return opcode if opcode in KINDS else None


def traffic(
    instruction: Instruction, within: Computation, slice_of: Sequence[int], num_devices: int
) -> Traffic:
    """One run of a collective. `slice_of[i]` is the slice or node of the program's device i.

    `wire` has the formulas. Of a ragged all-to-all the room that the operand has counts; the rows
    in it are known at run time only.
    """
    name = kind(instruction)
    operands = instruction.operands
    if name == "ragged-all-to-all" or instruction.opcode == "send":
        operands = operands[:1]
    size = math.fsum(a.bytes for operand in operands for a in within.instructions[operand].arrays)
    if instruction.opcode == "send":
        return _between_slices(instruction, name, size)
    if name == "collective-permute":
        moved = pairs(instruction)
        is_far = [slice_of[source] != slice_of[target] for source, target in moved]
        # Some device sends near and another far: each of the two sums is of the busiest device.
        return Traffic(1, 1, size, size * (False in is_far), size * (True in is_far))
    joined = groups(instruction, num_devices)
    parts = [[slice_of[device] for device in group] for group in joined]
    s = max(len(set(slices)) for slices in parts)
    m = max(slices.count(one) for slices in parts for one in set(slices))
    return wire(name, size, m, s)


def wire(name: str, size: float, m: int, s: int) -> Traffic:
    """One collective of n = s * m devices, in s slices of m, on operands of `size` = b bytes.

    A device sends

        all-gather        (s - 1) * b far, then (m - 1) * s * b near
        reduce-scatter    (m - 1) / m * b near, then (s - 1) / s * b / m far
        all-reduce        both of reduce-scatter's, twice
        all-to-all        (m - 1) / n * b near, (n - m) / n * b far

    which in one slice are the well-known (n - 1) / n of an all-gather's result, or of b.
    """
    n = m * s
    if name == "all-gather":
        return Traffic(1, 1, n * size, (m - 1) * s * size, (s - 1) * size)
    if name in ("all-to-all", "ragged-all-to-all"):
        return Traffic(1, 1, size, (m - 1) / n * size, (n - m) / n * size)
    times = 2 if name == "all-reduce" else 1
    near, far = (m - 1) / m * size, (s - 1) / s * size / m
    return Traffic(1, 1, size, times * near, times * far)


def _between_slices(instruction: Instruction, name: str, size: float) -> Traffic:
    """What goes through the hosts to other slices; a part within a slice stands on its own."""
    found = TARGET.search(instruction.attributes)
    if name == "collective-permute" or found is None:
        return Traffic(1, 1, size, 0.0, size)
    ends = [list(map(int, part.split(":"))) for part in found.group(1).split(",")]
    members = [number for end in ends for number in range(end[0], end[-1] + 1)]
    if members[0] < FIRST_OF_SLICE:
        return wire(name, size, 1, len(members))
    s = len({number // FIRST_OF_SLICE for number in members})
    return wire(name, size, len(members) // s, s)
