"""What one run of a compiled program does on one device: FLOPs, bytes moved, bytes sent."""

import dataclasses
import math
import re
from collections.abc import Sequence

from dsjax.plan.dots import flops, is_fp8
from dsjax.plan.hlo import Instruction, Module, parse
from dsjax.plan.loops import Frame, trip_count
from dsjax.plan.moved import moved
from dsjax.plan.traffic import Traffic, kind, traffic

# Calls that run what they call once. Other computations (reducers, comparators) work on scalars.
CALLS = ("call", "fusion", "call-start", "async-start", "fusion-start")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Per device and run. `traffic` by kind of collective; `notes` say what was taken for what.

    `fp8_flops` are those of `flops` that multiply FP8 by FP8.
    """

    flops: float = 0.0
    moved: float = 0.0
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fp8_flops: float = 0.0

    @property
    def near(self) -> float:
        """Bytes sent within the slice or node."""
        return math.fsum(one.near for one in self.traffic.values())

    @property
    def far(self) -> float:
        """Bytes sent to other slices or nodes."""
        return math.fsum(one.far for one in self.traffic.values())

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        kinds = {
            name: self.traffic.get(name, Traffic()).plus(one, times)
            for name, one in other.traffic.items()
        }
        return Counts(
            self.flops + times * other.flops,
            self.moved + times * other.moved,
            self.traffic | kinds,
            self.notes + tuple(note for note in other.notes if note not in self.notes),
            self.fp8_flops + times * other.fp8_flops,
        )


def count(
    text: str, slice_of: Sequence[int] | None = None, *, outer_trips: int = 1, inner_trips: int = 1
) -> Counts:
    """Counts the program that `compiled.as_text()` prints.

    `slice_of[i]` is the slice or node of its device i (None: all are in one). Loops whose number of
    passes only the run knows count `outer_trips` times in the entry computation, where those over
    micro-batches are, and `inner_trips` times elsewhere. Of a conditional the branch that sends
    most counts, or of equals the one that computes most.
    """
    module = parse(text)
    if slice_of is None:
        slice_of = [0] * max(module.num_devices, 1)
    return _Walk(module, slice_of, outer_trips, inner_trips).of(
        Frame(module.computations[module.entry]), is_fused=False, is_entry=True
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    module: Module
    slice_of: Sequence[int]
    outer_trips: int
    inner_trips: int

    def of(self, frame: Frame, *, is_fused: bool, is_entry: bool = False) -> Counts:
        """One run of a computation; in a fusion nothing moves but what the fusion itself does."""
        module, within, total = self.module, frame.computation, Counts()
        for instruction in within.instructions.values():
            opcode, called = instruction.opcode, instruction.called
            if opcode == "while":
                total = self._loop(total, frame, instruction, is_entry)
            elif opcode == "conditional":
                total = self._conditional(total, frame, instruction)
            elif opcode in CALLS:
                name = called.get("calls") or called["to_apply"]
                inner = Frame(module.computations[name], frame, instruction)
                is_inside = is_fused or opcode == "fusion"
                total = total.plus(self.of(inner, is_fused=is_inside, is_entry=is_entry))
            if (name := kind(instruction)) is not None:
                sent = traffic(instruction, within, self.slice_of, module.num_devices)
                total = total.plus(Counts(traffic={name: sent}))
            computed = flops(instruction, within)
            note = (
                () if computed is not None else (f"no FLOPs known of kernel {_plain(instruction)}",)
            )
            bytes_moved = 0.0 if is_fused else moved(instruction, within, module)
            narrow = computed if computed and is_fp8(instruction, within) else 0.0
            total = total.plus(Counts(computed or 0.0, bytes_moved, {}, note, narrow))
        return total

    def _loop(self, total: Counts, frame: Frame, loop: Instruction, is_entry: bool) -> Counts:
        trips = trip_count(self.module, frame, loop)
        body = Frame(self.module.computations[loop.called["body"]], frame, loop)
        inner = self.of(body, is_fused=False)
        if trips is not None:
            return total.plus(inner, trips)
        trips = self.outer_trips if is_entry else self.inner_trips
        note = f"loop {_plain(loop)} runs as often as the data says: counted x {trips}"
        return total.plus(inner, trips).plus(Counts(notes=(note,)))

    def _conditional(self, total: Counts, frame: Frame, instruction: Instruction) -> Counts:
        branches = [
            self.of(Frame(self.module.computations[name], frame, instruction), is_fused=False)
            for name in instruction.branches
        ]
        most = max(branches, key=lambda one: (one.near + one.far, one.flops))
        if all(one == most for one in branches):
            return total.plus(most)
        note = f"conditional {_plain(instruction)}: its larger branch counted"
        return total.plus(most).plus(Counts(notes=(note,)))


def _plain(instruction: Instruction) -> str:
    """The end of its name in the source; copies of it that differ in what is around are alike."""
    parts = instruction.op_name.split("/")
    return "/".join(parts[-3:]) if instruction.op_name else re.sub(r"[.\d]+$", "", instruction.name)
