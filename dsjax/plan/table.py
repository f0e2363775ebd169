"""What a plan says, for people: tables, and one row of Markdown for a list of plans."""

import dataclasses

from rich.console import Console

from dsjax.convert import tables
from dsjax.plan.buffers import Buffer, Memory, OutOfMemory
from dsjax.plan.chips import Topology
from dsjax.plan.counting import Counts
from dsjax.plan.roofline import Roofline, roofline
from dsjax.progress import in_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One compiled step, of training or of serving.

    `useful`: FLOPs of one step and device by the formula of `dsjax.flops`. `parameters`: how many,
    by kind, the first of which `row` shows. `beyond`: why the program may compute more than that
    formula counts. `seconds` took the compiler.
    """

    title: str
    topology: Topology
    mesh: str
    parameters: dict[str, int]
    memory: Memory
    largest: tuple[Buffer, ...]
    useful: float
    counts: Counts
    beyond: tuple[str, ...]
    seconds: float

    @property
    def roofline(self) -> Roofline:
        return roofline(self.counts, self.useful, self.topology.chip)

    @property
    def needed(self) -> float:
        """Bytes of a device's memory that the program takes.

        TPU's compiler gives several values one place in turn and refuses what is more than the
        memory at its peak, so that counts where it says it. On GPUs a run allocates the sum.
        """
        is_said = self.topology.chip.is_tpu and self.memory.peak
        return self.memory.peak if is_said else self.memory.total

    @property
    def spare(self) -> float:
        """Bytes of a device's memory that are left; negative: it does not fit."""
        return self.topology.chip.hbm - self.needed

    @property
    def fits(self) -> bool:
        return self.spare >= 0


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints everything, figures per device (a TPU7x chip is two)."""
    chip, counts = plan.topology.chip, plan.counts

    def table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        tables.show(title, header, rows, console)

    where = f"{plan.topology.name}, {plan.topology.num_devices:,} devices"
    if plan.topology.slices > 1:
        where += f" in {plan.topology.slices} slices"
    table(
        f"{plan.title} on {where}, {plan.mesh}; compiled in {plan.seconds:.0f} s",
        ("parameters", "number"),
        [(name, f"{number:,}") for name, number in plan.parameters.items()],
    )
    table(f"memory of one {chip.name} device", ("what", "bytes", "of HBM"), _memory(plan))
    table(
        "largest buffers",
        ("shape", "bytes", "where"),
        [(buffer.shape, in_bytes(buffer.bytes), _short(buffer.op_name)) for buffer in plan.largest],
    )
    formula, compiled = plan.useful, plan.counts.flops
    table(
        f"FLOPs of one step and device; compiled may be more for {'; '.join(plan.beyond)}",
        ("counted", "TFLOP", "ratio"),
        [
            ("by formula", f"{formula / 1e12:,.3f}", "1"),
            ("as compiled", f"{compiled / 1e12:,.3f}", f"{compiled / formula:.3f}"),
        ],
    )
    rows = [
        (name, f"{one.ops:,.0f}", f"{one.calls:,.0f}", *map(in_bytes, one[2:]))
        for name, one in counts.traffic.items()
    ]
    rows.append(("all", *_sums(counts)))
    sent = tuple(f"sent over {link}" for link in chip.links)
    header = ("collective", "in program", "run", "works on", *sent)
    table("collectives of one step and device", header, rows)
    table("least time of one step", ("part", "seconds", "rate"), _times(plan))
    if counts.notes:
        table("taken for granted", ("what",), [(note,) for note in counts.notes])


def _short(op_name: str, most: int = 70) -> str:
    """The end of a long name: what it is says more than what it is in."""
    return op_name if len(op_name) <= most else f"...{op_name[3 - most :]}"


def _memory(plan: Plan) -> list[tuple[str, ...]]:
    memory, hbm = plan.memory, plan.topology.chip.hbm
    verdict = "left of" if plan.fits else "MISSING: more than the"
    rows = [
        ("arguments", memory.arguments),
        ("outputs beside them", memory.outputs - memory.aliased),
        ("temporaries", memory.temporaries),
        ("all", memory.total),
        *([("alive at most, as planned", memory.peak)] if memory.peak else []),
        (f"{verdict} {in_bytes(hbm)}", abs(plan.spare)),
    ]
    return [(name, in_bytes(size), f"{size / hbm:.1%}") for name, size in rows]


def _sums(counts: Counts) -> tuple[str, ...]:
    every = counts.traffic.values()
    ops, calls = sum(one.ops for one in every), sum(one.calls for one in every)
    return f"{ops:,.0f}", f"{calls:,.0f}", "", in_bytes(counts.near), in_bytes(counts.far)


def _times(plan: Plan) -> list[tuple[str, ...]]:
    line, chip = plan.roofline, plan.topology.chip
    rates = (
        _rate(chip.bf16_flops) + f", FP8 {_rate(chip.fp8_flops)}" * bool(plan.counts.fp8_flops),
        *(
            f"{in_bytes(rate)}/s"
            for rate in (chip.hbm_bandwidth, chip.ici_bandwidth, chip.dcn_bandwidth)
        ),
    )
    rows = [
        (part, f"{seconds:.4f}", rate)
        for (part, seconds), rate in zip(line.parts.items(), rates, strict=True)
    ]
    return [
        *rows,
        (f"all at once: {line.bound} decides", f"{line.overlapped:.4f}", _mfu(line.best_mfu)),
        ("one after the other", f"{line.in_turn:.4f}", _mfu(line.mfu_in_turn)),
    ]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP/s"


def _mfu(share: float) -> str:
    return f"MFU {share:.1%} at most"


COLUMNS = (
    *("run", "chips", "mesh", "parameters", "bytes per device", "of HBM"),
    *(
        "TFLOP by formula, compiled",
        "sent near",
        "sent far",
        "least step",
        "MFU at most",
        "compile",
    ),
)
ROW_HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(plan: Plan) -> str:
    """The plan as one row of Markdown under `ROW_HEADER`."""
    line, hbm = plan.roofline, plan.topology.chip.hbm
    slices = f" x {plan.topology.slices} slices" if plan.topology.slices > 1 else ""
    fits = f"{plan.needed / hbm:.0%}" + ("" if plan.fits else ", does not fit")
    cells = (
        plan.title,
        f"{plan.topology.name}{slices}",
        plan.mesh,
        f"{next(iter(plan.parameters.values())):,}",
        in_bytes(plan.needed),
        fits,
        f"{plan.useful / 1e12:,.1f}, {plan.counts.flops / 1e12:,.1f}",
        in_bytes(plan.counts.near),
        in_bytes(plan.counts.far),
        f"{line.overlapped:.3f} s ({line.bound})",
        f"{line.best_mfu:.0%}",
        f"{plan.seconds:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def refusal(error: OutOfMemory, topology: Topology) -> str:
    """What to tell of a program that the compiler refused for its memory."""
    lines = [
        f"does not fit: the compiler wants {in_bytes(error.needed)} of the "
        f"{in_bytes(error.available)} that a {topology.chip.name} device has, "
        f"{in_bytes(error.needed - error.available)} too much; more devices under mesh.fsdp, a "
        "smaller batch.micro, or another remat make it less",
    ]
    lines += [
        f"  {in_bytes(buffer.bytes)}  {buffer.shape}  {buffer.op_name}" for buffer in error.largest
    ]
    return "\n".join(lines)
