"""`dsjax plan CONFIG topology=CHIP:SIZES [slices=N] [key=value ...]`: will it fit, how fast is it.

With phase=prefill or phase=decode, rows=N and length=N it is about serving instead of training.

A machine with a CPU is enough. With the compiler of the chips installed (`pip install 'dsjax[tpu]'`
or `'dsjax[gpu]'`) the whole training step is compiled for them; without, arithmetic has to do.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax

from dsjax import sharding
from dsjax.convert import fitting, tables
from dsjax.plan import absent, chips, predict, search, table
from dsjax.plan.buffers import OutOfMemory
from dsjax.plan.chips import Topology
from dsjax.plan.compiling import compile_step
from dsjax.plan.serving import Phase, compile_phase
from dsjax.progress import in_bytes
from dsjax.run import MeshShape, Run
from dsjax.run_file import load


def plan(config: str, assignments: Sequence[str], *, searching: bool = False) -> bool:
    """Prints the plan; whether what was asked for fits. Raises ValueError for what cannot be.

    Without the search the run is taken as it is. With it, meshes, micro-batches and remat policies
    are tried, the best of them by the compiler.
    """
    jax.config.update("jax_platforms", "cpu")
    topology, phase, rest = _asked(assignments)
    run = load(config, *rest)
    if phase is not None:
        return _planned(run, phase, topology, searching=searching)
    if searching:
        return _search(run, topology)
    try:
        outcome = compile_step(run, topology)
    except absent.NoCompiler as missing:
        print(f"by arithmetic only, as nothing was compiled: {missing}")
        return _predicted(run, topology)
    return _shown(outcome, topology)


def _planned(run: Run, phase: Phase, topology: Topology, *, searching: bool) -> bool:
    if searching:
        raise ValueError("--search is about training steps; leave out phase=")
    try:
        return _shown(compile_phase(run, phase, topology), topology)
    except absent.NoCompiler as missing:
        raise ValueError(f"{missing}; arithmetic is about training steps only") from missing


def _shown(outcome: table.Plan | OutOfMemory, topology: Topology) -> bool:
    if isinstance(outcome, OutOfMemory):
        print(table.refusal(outcome, topology))
        return False
    table.show(outcome)
    print(f"\n{table.ROW_HEADER}\n{table.row(outcome)}")
    return outcome.fits


def _asked(assignments: Sequence[str]) -> tuple[Topology, Phase | None, list[str]]:
    """For what chips, for which phase of serving if any, and the keys of the run."""
    given, rest = {"slices": "1", "phase": "train"}, []
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        if key in ("topology", "slices", "phase", "rows", "length"):
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
    if given["phase"] == "train":
        if numbers:
            raise ValueError(f"{', '.join(sorted(numbers))}: only with phase=prefill or decode")
        return topology, None, rest
    if missing := {"rows", "length"} - numbers.keys():
        raise ValueError(f"phase={given['phase']} needs {' and '.join(sorted(missing))} too")
    return topology, Phase(given["phase"], **numbers), rest


def _search(run: Run, topology: Topology) -> bool:
    try:
        absent.devices(topology)
        found = search.search(run, topology, functools.partial(compile_step, topology=topology))
    except absent.NoCompiler as missing:
        print(f"by arithmetic only, as nothing was compiled: {missing}")
        found = search.search(run, topology, compile_step, top=0)
    search.show(found)
    best = found[0]
    return best.prediction.fits if best.outcome is None else getattr(best.outcome, "fits", False)


def _predicted(run: Run, topology: Topology) -> bool:
    sizes = sharding.mesh_sizes(topology.num_devices, **dataclasses.asdict(run.mesh))
    run = dataclasses.replace(run, mesh=MeshShape(**sizes))
    found = predict.predict(run, fitting.weights(run.model, is_fp8=False), topology)
    if found is None:
        raise ValueError(
            f"{search.written(run.mesh)} does not divide over the {topology.num_devices} devices "
            f"of {topology.name}, or the batch or a weight does not divide over it"
        )
    rows = [(name, in_bytes(size)) for name, size in found.bytes.items()]
    rows.append(("all", f"{in_bytes(found.total_bytes)} of {in_bytes(found.available)}"))
    tables.show(f"memory of one {topology.chip.name} device", ("what", "bytes"), rows)
    rows = [(name, f"{seconds:.3f}") for name, seconds in found.seconds.items()]
    tables.show("time of one step", ("part", "seconds"), rows)
    return found.fits
