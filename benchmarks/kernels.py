"""Times the kernels on a Hopper GPU against what the chip can do, and against others.

    python benchmarks/kernels.py                       (one family: dense; one shape: --only "V3 o")

The limit is the larger of FLOPs over the chip's dense rate and bytes over its memory bandwidth,
both of the data sheet (`dsjax/plan/chips.py`); every operand and result counts once. Each result of
ours is checked before it is timed, and what is wrong is not timed. Inputs are random normal
numbers, never zeros, which need less power and so run faster; several sets of them take turns, so
that a cache does not hold them. All contenders of a shape are compiled first and then take turns,
medians count; nvidia-smi says meanwhile what clocks they ran at. Goals are the project's for an
H200 (`kernels_cases.py`). Others run where they are installed (`kernels_peers.py`): XLA's products;
torch's in BF16 and in FP8 without scales, with one to a row (less work than ours) and to a block
(the same); tokamax's grouped ones, with tiles that it tuned for another shape. One that fails
leaves its reason below the shape.
"""

import argparse
import importlib.metadata
import math
import os
import statistics
import sys
import time
import traceback

import jax
import jax.numpy as jnp
from kernels_cases import FAMILIES, Case, Goal
from kernels_clocks import card, watched
from kernels_peers import Contender, jax_turns

from dsjax.plan.chips import BY_KIND, Chip
from pallas_kernels import chip, select

# The sets of inputs together are larger than any cache of the chip.
CACHE, MOST_SETS = 128e6, 16
# One turn of a contender, so that starting and waiting do not count.
TURN_S = 0.03


def limit(case: Case, here: Chip) -> tuple[float, str]:
    """Seconds below which the chip cannot go, and what is in the way."""
    compute, memory = case.flops / getattr(here, case.peak), case.num_bytes / here.hbm_bandwidth
    return (compute, "compute") if compute > memory else (memory, "memory")


def wrong(case: Case) -> str | None:
    """What is wrong with the result of ours, or None."""
    inputs = jax.jit(case.draw)(jax.random.key(0))
    found, expected = (jax.jit(function)(*inputs) for function in (case.ours, case.oracle))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        error = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
        if not error <= case.error:
            return f"error {error:.2e}, allowed are {case.error:.2e}"
    return None


def contenders(case: Case, sets: int) -> tuple[dict[str, Contender], dict[str, Exception]]:
    """Ours and the others that can be built; and why not, of those that cannot."""
    built, failed = {"ours": jax_turns(case.draw, case.ours, sets)}, {}
    for name, build in case.peers.items():
        try:
            built[name] = build(sets)
        except Exception as error:  # another project's: its reason is the result
            # Without the traceback, whose frames hold arrays.
            failed[name] = error.with_traceback(None)
    return built, failed


def timed(
    built: dict[str, Contender], sets: int, rounds: int, floor_s: float
) -> tuple[dict[str, float], dict[str, Exception]]:
    """Median seconds of one call, each turn running every set several times; and who failed."""
    repeats = max(1, math.ceil(TURN_S / (sets * floor_s)))
    seconds: dict[str, list[float]] = {name: [] for name in built}
    failed: dict[str, Exception] = {}
    for _ in range(rounds):
        for name in [one for one in built if one not in failed]:
            try:
                began, result = time.perf_counter(), None
                for _ in range(repeats):
                    result = built[name].turn()
                built[name].wait(result)
                seconds[name].append((time.perf_counter() - began) / (repeats * sets))
            except Exception as error:
                if name == "ours":
                    raise
                failed[name] = error.with_traceback(None)
    return {
        name: statistics.median(times) for name, times in seconds.items() if name not in failed
    }, failed


def rate(case: Case, second: float, unit: str) -> float:
    return {"TFLOP/s": case.flops, "TB/s": case.num_bytes}[unit] / second / 1e12


def verdict(case: Case, goal: Goal, seconds: dict[str, float]) -> str:
    """Whether ours reached the goal, or that nobody ran to compare with."""
    if not goal.of:
        found, wanted = rate(case, seconds["ours"], goal.unit), f"{goal.least:g} {goal.unit}"
    else:
        others = [seconds[name] for name in goal.of if name in seconds]
        wanted = f"{goal.least:g} of {' or '.join(goal.of)}"
        if not others:
            return f"{wanted}: neither ran"
        found = min(others) / seconds["ours"]
        wanted += f" ({found:.2f})"
    return f"{wanted}: {'reached' if found >= goal.least else 'MISSED'}"


def row(case: Case, name: str, seconds: dict[str, float], floor_s: float) -> str:
    """Time, rate and share of the limit; of others how many times as fast ours is."""
    second = seconds[name]
    tera, bandwidth = (f"{rate(case, second, unit):.4g} {unit}" for unit in ("TFLOP/s", "TB/s"))
    line = f"  {name:28} {second * 1e6:9.1f} us {tera if case.flops else bandwidth:>14}"
    line += f" {floor_s / second:5.0%} of the limit"
    if name != "ours":
        return f"{line}; ours is {second / seconds['ours']:.2f} times as fast"
    # Others may read and write other bytes than these.
    return f"{line}; {bandwidth}" if case.flops else line


def report(case: Case, here: Chip, rounds: int, notes: list[str]) -> bool:
    """Prints the rows of one shape; whether ours was right. New reasons are added to `notes`."""
    floor_s, bound = limit(case, here)
    print(f"{case.name}: limit {floor_s * 1e6:.1f} us ({bound})", flush=True)
    if fault := wrong(case):
        print(f"  ours: WRONG, {fault}", flush=True)
        return False
    sets = min(MOST_SETS, max(2, math.ceil(CACHE / case.num_bytes)))
    built, failed = contenders(case, sets)
    (seconds, dropped), clocks = watched(lambda: timed(built, sets, rounds, floor_s))
    for name in seconds:
        print(row(case, name, seconds, floor_s))
    known = len(notes)
    for name, error in (failed | dropped).items():
        print(f"  {name:28} {reason(error, notes)}")
    for number, note in enumerate(notes[known:], known + 1):
        print(f"  [{number}] {note}")
    for goal in case.goals:
        print(f"  goal {verdict(case, goal, seconds)}")
    print(f"  under load: {clocks}", flush=True)
    return True


def reason(error: Exception, notes: list[str]) -> str:
    """Why another did not run, at length in `notes` unless it is there already."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: no module {error.name}"
    note = f"{type(error).__name__}: {(str(error).splitlines() or ['no more is said'])[0]}"
    if note not in notes:
        notes.append(note)
    return f"failed [{notes.index(note) + 1}]"


def versions() -> str:
    def version(name):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {name}"

    return ", ".join(map(version, ("jax", "jaxlib", "torch", "tokamax")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="our kernels on a Hopper GPU, against its limits")
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; without any: all")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    options = parser.parse_args(arguments)
    if unknown := set(options.family) - set(FAMILIES):
        parser.error(f"family {sorted(unknown)}; there are {', '.join(FAMILIES)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory, too
    try:
        chip.needs_hopper("benchmarks")
    except select.Unsupported as error:
        print(f"{error}; `make aot` compiles the kernels without one", file=sys.stderr)
        return 2
    here = BY_KIND.get(chip.chip().kind)
    if here is None:
        print(f"no limits of {chip.chip().kind!r} in dsjax/plan/chips.py", file=sys.stderr)
        return 2
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {chip.chip().kind}, {card()}; {versions()}")
    print(f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}; command: {' '.join(sys.argv)}\n")
    cases = [one for name in options.family or FAMILIES for one in FAMILIES[name]()]
    right, notes = [], []
    for case in cases:
        if options.only in case.name:
            try:
                right.append(report(case, here, options.rounds, notes))
            except Exception:  # the other shapes still run: time on a GPU is rare
                traceback.print_exc()
                right.append(False)
    if not right:
        print(f"--only {options.only!r}: no case has that in its name", file=sys.stderr)
    return 0 if right and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
