"""`dsjax plan CONFIG topology=CHIP:SIZES [slices=N] [key=value ...]`: will it fit, how fast is it.

With phase=prefill or phase=decode, rows=N and length=N it is about serving instead of training.
With until=memory the compiler is stopped when it has assigned all memory, before machine code.

A machine with a CPU is enough. With the compilers of TPUs and GPUs (`pip install -e '.[aot]'`) the
whole training step is compiled for the chips; without, it is only lowered, and arithmetic has to
do.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax

from dsjax.convert import fitting, tables
from dsjax.plan import absent, chips, compiling, early, predict, search, table
from dsjax.plan.buffers import OutOfMemory
from dsjax.plan.chips import Topology
from dsjax.plan.serving import Phase, compile_phase
from dsjax.progress import in_bytes
from dsjax.run import MeshShape, Run
from dsjax.run_file import load


class Asked(NamedTuple):
    """For what chips, for which phase of serving if any, until when, and the keys of the run."""

    topology: Topology
    phase: Phase | None
    is_early: bool
    rest: list[str]


def plan(config: str, assignments: Sequence[str], *, searching: bool = False) -> bool:
    """Prints the plan; whether what was asked for fits. Raises ValueError for what cannot be.

    Without the search the run is taken as it is. With it, meshes, micro-batches and remat policies
    are tried, the best of them by the compiler.
    """
    jax.config.update("jax_platforms", "cpu")
    asked = _asked(assignments)
    run = load(config, *asked.rest)
    if searching:
        if asked.phase is not None:
            raise ValueError("--search is about training steps; leave out phase=")
        return _search(run, asked)
    try:
        return _shown(_compiled(run, asked), asked.topology)
    except absent.NoCompiler as missing:
        if asked.phase is not None:
            raise ValueError(f"{missing}; arithmetic is about training steps only") from missing
        print(f"by arithmetic only, as nothing was compiled: {missing}")
        return _predicted(run, asked.topology)


def _compiled(run: Run, asked: Asked) -> table.Plan | OutOfMemory:
    if asked.is_early:
        return early.apart(_outcome, run, asked)
    return _outcome(run, asked)


def _outcome(run: Run, asked: Asked) -> table.Plan | OutOfMemory:
    jax.config.update("jax_platforms", "cpu")
    by = early.planned if asked.is_early else compiling.finished
    if asked.phase is None:
        return compiling.compile_step(run, asked.topology, by=by)
    return compile_phase(run, asked.phase, asked.topology, by=by)


def _shown(outcome: table.Plan | OutOfMemory, topology: Topology) -> bool:
    if isinstance(outcome, OutOfMemory):
        print(table.refusal(outcome, topology))
        return False
    table.show(outcome)
    print(f"\n{table.ROW_HEADER}\n{table.row(outcome)}")
    return outcome.fits


def _asked(assignments: Sequence[str]) -> Asked:
    given, rest = {"slices": "1", "phase": "train", "until": "code"}, []
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key in ("topology", "slices", "phase", "rows", "length", "until"):
            given[key] = value
        else:
            rest.append(assignment)
    if "topology" not in given:
        raise ValueError("say for which chips: topology=v5p:8x8x8, or topology=h100:1x8")
    numbers = {}
    for key in given.keys() & {"slices", "rows", "length"}:
        if not given[key].isdecimal():
            raise ValueError(f"{key}={given[key]} must be a whole number")
        numbers[key] = int(given[key])
    topology = chips.topology(given["topology"], numbers.pop("slices"))
    if given["until"] not in ("code", "memory"):
        raise ValueError(f"until={given['until']}: a compiler works until memory, or until code")
    is_early = given["until"] == "memory"
    if given["phase"] == "train":
        if numbers:
            raise ValueError(f"{', '.join(sorted(numbers))}: only with phase=prefill or decode")
        return Asked(topology, None, is_early, rest)
    if missing := {"rows", "length"} - numbers.keys():
        raise ValueError(f"phase={given['phase']} needs {' and '.join(sorted(missing))} too")
    return Asked(topology, Phase(given["phase"], **numbers), is_early, rest)


def _search(run: Run, asked: Asked) -> bool:
    compile_step = functools.partial(_compiled, asked=asked)
    try:
        absent.devices(asked.topology)
    except absent.NoCompiler as missing:
        print(f"by arithmetic only, as nothing was compiled: {missing}")
        compile_step = None
    found = search.search(run, asked.topology, compile_step)
    search.show(found)
    # A prediction is no answer where there is a compiler.
    return found[0].fits and (compile_step is None or found[0].outcome is not None)


def _predicted(run: Run, topology: Topology) -> bool:
    mesh = absent.mesh(topology, **dataclasses.asdict(run.mesh))
    run = dataclasses.replace(run, mesh=MeshShape(**mesh.shape))
    # Finds what does not divide, and says its name.
    compiling.lowered(run, mesh)
    found = predict.predict(run, fitting.weights(run.model, is_fp8=False), topology)
    assert found is not None, f"{run.mesh} can be lowered, but some weight is not known to divide"
    chip, useful = topology.chip, compiling.useful(run, topology.num_devices)
    tables.show(
        f"{compiling.title(run)} on {topology.name}, {search.written(run.mesh)}; lowered",
        ("parameters", "number"),
        [(name, f"{number:,}") for name, number in compiling.parameters(run.model).items()],
    )
    rows = [(name, in_bytes(size)) for name, size in found.bytes.items()]
    rows.append(("all", f"{in_bytes(found.total_bytes)} of {in_bytes(found.available)}"))
    tables.show(f"memory of one {chip.name} device", ("what", "bytes"), rows)
    least = max(found.seconds.values())
    rows = [(name, f"{seconds:.3f}") for name, seconds in found.seconds.items()]
    rows.append(("all at once", f"{least:.3f}, MFU {useful / chip.bf16_flops / least:.1%} at most"))
    tables.show(
        f"time of one step of {useful / 1e12:,.3f} TFLOP per device by formula, all as BF16",
        ("part", "seconds"),
        rows,
    )
    return found.fits
