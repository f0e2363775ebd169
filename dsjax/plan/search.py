"""Which mesh, micro-batch and remat suit a run and given chips: predicted, then compiled."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console

from dsjax import config
from dsjax.convert import fitting, tables
from dsjax.plan.buffers import OutOfMemory
from dsjax.plan.chips import Topology
from dsjax.plan.predict import Prediction, predict
from dsjax.plan.table import Plan
from dsjax.progress import in_bytes
from dsjax.run import MeshShape, Run

# Cutting heads or sequences further costs more in traffic than it saves, or leaves no work to do.
MOST_TENSOR, MOST_CONTEXT, LEAST_TOKENS = 8, 8, 128
# Sequences that a device computes at a time.
ROWS = (1, 2, 4)
# Of policies that take equally long, the one that keeps more is better, and none needs the host's
# memory that can do without.
TRIED = ("none", "save_latents", "full", "offload")
# Predictions are rough: what fills the memory to the last byte is not worth compiling.
SHARE = 0.9


class Found(NamedTuple):
    """A prediction and what came of compiling it, if it was."""

    prediction: Prediction
    outcome: Plan | OutOfMemory | None = None

    @property
    def fits(self) -> bool:
        """By the compiler's word, or by arithmetic where there is none."""
        if self.outcome is None:
            return self.prediction.fits
        return isinstance(self.outcome, Plan) and self.outcome.fits


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def meshes(run: Run, topology: Topology) -> Iterator[MeshShape]:
    """Sensible meshes of all devices: what tensor, context and expert leave goes to fsdp.

    Several slices are copies of each other (`data`): between them only gradients travel.
    """
    num_devices, length = topology.num_devices, run.batch.length
    data = topology.slices
    blocks = [*run.model.blocks, *run.model.mtp]
    heads = math.gcd(*(block.attention.num_heads for block in blocks))
    experts = [block.ffn.num_experts for block in blocks if isinstance(block.ffn, config.Moe)]
    for tensor in _divisors(heads, MOST_TENSOR):
        for context in _divisors(length, MOST_CONTEXT):
            short = context * tensor > 1 and length // (context * tensor) < LEAST_TOKENS
            if short or num_devices % (data * tensor * context):
                continue
            rest = num_devices // (data * tensor * context)
            for expert in _divisors(math.gcd(rest, *experts) if experts else 1, rest):
                if any(number % (expert * tensor) for number in experts):
                    continue
                fsdp = rest // expert
                yield MeshShape(data=data, fsdp=fsdp, expert=expert, tensor=tensor, context=context)


def candidates(run: Run, topology: Topology) -> Iterator[Run]:
    """`run` on every sensible mesh, with micro-batches that its batch (and ramp) divides into."""
    for mesh in meshes(run, topology):
        shares = mesh.data * mesh.fsdp * mesh.expert
        for rows in ROWS:
            micro, batch = shares * rows, run.batch
            if batch.size % micro or (batch.ramp_from or batch.size) % micro:
                continue
            for remat in TRIED:
                yield dataclasses.replace(
                    run,
                    mesh=mesh,
                    batch=dataclasses.replace(batch, micro=micro),
                    remat=remat,
                )


def search(
    run: Run,
    topology: Topology,
    compile_step: Callable[[Run], Plan | OutOfMemory] | None,
    *,
    top: int = 3,
    most: int = 8,
) -> list[Found]:
    """All candidates, best first: those predicted to fit by time, then the others by memory.

    With `compile_step` those that are predicted to fit, with a tenth to spare, are compiled, until
    `top` of them do or `most` are compiled. Those that do come first, by their time in turn, and
    those that do not last. ValueError if nothing divides.
    """
    weights = fitting.weights(run.model, is_fp8=False)
    predictions = [
        prediction
        for candidate in candidates(run, topology)
        if (prediction := predict(candidate, weights, topology)) is not None
    ]
    if not predictions:
        raise ValueError(
            f"batch.size={run.batch.size} (ramp_from={run.batch.ramp_from}) cannot be shared by "
            f"{topology.num_devices} devices of {topology.name}; choose a multiple of the devices, "
            "or fewer devices"
        )
    easily = [one for one in predictions if one.total_bytes <= SHARE * one.available]
    hardly = [one for one in predictions if one.total_bytes > SHARE * one.available]
    easily.sort(key=lambda one: one.total_seconds)
    hardly.sort(key=lambda one: one.total_bytes)
    fitting_ones: list[Found] = []
    refused: list[Found] = []
    tried = easily[: most if compile_step else 0]
    for one in tried:
        if len(fitting_ones) == top:
            break
        found = Found(one, compile_step(one.run))
        (fitting_ones if found.fits else refused).append(found)
    fitting_ones.sort(key=lambda found: found.outcome.roofline.in_turn)
    rest = (*easily[len(fitting_ones) + len(refused) :], *hardly)
    return [*fitting_ones, *(Found(one) for one in rest), *refused]


HEADER = ("mesh, batch.micro, remat", "bytes", "s", "compiled bytes", "s overlapped", "s in turn")


def show(found: list[Found], most: int = 10, console: Console | None = None) -> None:
    """Prints the first `most` and all compiled: what was predicted and what the compiler says."""
    rows = []
    shown = [*found[:most], *(one for one in found[most:] if one.outcome is not None)]
    for prediction, outcome in shown:
        run, compiled = prediction.run, ("", "", "")
        if isinstance(outcome, Plan):
            line = outcome.roofline
            fits = "" if outcome.fits else " too many"
            compiled = (
                in_bytes(outcome.needed) + fits,
                f"{line.overlapped:.3f}",
                f"{line.in_turn:.3f}",
            )
        elif outcome is not None:
            compiled = (f"{in_bytes(outcome.needed)} too many", "", "")
        much = "" if prediction.fits else " too many"
        rows.append(
            (
                f"{written(run.mesh)} batch.micro={run.batch.micro} remat={run.remat}",
                in_bytes(prediction.total_bytes) + much,
                f"{prediction.total_seconds:.3f}",
                *compiled,
            )
        )
    tables.show("predicted and compiled, best first", HEADER, rows, console)


def written(mesh: MeshShape) -> str:
    """The mesh as it is given on the command line, axes of one device left out."""
    used = {name: size for name, size in dataclasses.asdict(mesh).items() if size != 1}
    return " ".join(f"mesh.{name}={size}" for name, size in (used or {"fsdp": 1}).items())
