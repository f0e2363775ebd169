"""Recipes compiled for chips that are not here: `make plan`, or with ARGS=gpu or ARGS=tiny.

    python benchmarks/plans.py [tiny|gpu] [whole] [WORD ...]

Prints a Markdown table: for each recipe memory of a device as the compiler has it, FLOPs, bytes
sent, and the least time of a step. Without `gpu` for TPUs, `tiny`: a small V3 for each kind of
chip, and what of it a CPU cannot run. WORDs choose among the recipes. Exit code 1 if one does not
fit.
All but the word `whole` stop at the plan of memory, before machine code is made: "compile" is the
time until then.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

WHOLE = ("optim.moments=bf16", "precision=bf16", "remat=full")


class Recipe(NamedTuple):
    """A run file and what is changed in it for `slices` of `topology`."""

    config: str
    topology: str
    changes: tuple[str, ...]
    slices: int = 1


def rows(number: int, *names: str) -> tuple[str, ...]:
    return tuple(f"batch.{name}={number}" for name in names)


def v3(topology: str, number: int, *changes: str) -> Recipe:
    """The whole recipe of V3: MTP, groups, bias, sequence-wise loss, 4,096 tokens, BF16 moments."""
    batch = rows(number, "size", "micro", "ramp_from")
    return Recipe("configs/v3.py", topology, (*WHOLE, *batch, *changes))


def long(topology: str, length: int, number: int, *mesh: str) -> Recipe:
    """V3's context extension: rows of `length` tokens, each over several chips."""
    return v3(topology, number, f"batch.length={length}", *mesh)


def v2(topology: str, number: int, *mesh: str) -> Recipe:
    changes = (*WHOLE, *rows(number, "size", "micro", "ramp_from"), *mesh)
    return Recipe("configs/v2.py", topology, changes)


def lite(topology: str, number: int) -> Recipe:
    """V2-Lite, one sequence per chip."""
    changes = (*WHOLE, *rows(number, "size", "micro"), "mesh.expert=8")
    return Recipe("configs/v2_lite.py", topology, changes)


LARGE = (
    v3("v5p:8x8x8", 4 * 512, "mesh.expert=128"),
    v3("v5p:4x8x8", 2 * 256, "mesh.expert=128"),
    v3("v5p:4x4x8", 1 * 128, "mesh.expert=128"),
    v3("tpu7x:4x4x4", 1 * 128, "mesh.expert=128"),
    *(lite(topology, devices) for topology, devices in (("v5e:4x8", 32), ("v6e:4x4", 16))),
    v2("v5p:4x4x4", 64, "mesh.expert=32", "mesh.fsdp=2"),
    Recipe(
        "configs/kimi_k2.py",
        "v5p:4x8x8",
        (*WHOLE, *rows(256, "size", "micro"), "mesh.expert=128", "mesh.fsdp=2"),
    ),
    long("v5p:8x8x8", 32_768, 128, "mesh.expert=128", "mesh.context=4"),
    long("v5p:8x8x16", 131_072, 32, "mesh.expert=32", "mesh.tensor=4", "mesh.context=8"),
    # FP32 moments, as the runs of others that are compared with.
    v3("v5p:8x8x8", 2 * 512, "mesh.expert=128", "optim.moments=fp32"),
    v3("v5p:4x8x8", 1 * 256, "mesh.expert=128", "optim.moments=fp32"),
)
GPU = (
    v3("h200:16x8", 128, "mesh.expert=128"),
    v2("h200:4x8", 32, "mesh.expert=32"),
    lite("h100:1x8", 8),
)


def tiny(topology: str, *changes: str, slices: int = 1) -> Recipe:
    changes = ("precision=bf16", "mesh.expert=2", *changes)
    return Recipe("configs/tiny_v3.py", topology, changes, slices)


TINY = (
    *map(tiny, ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h200:2x2")),
    # What no CPU has: rows sent as they are, layers' inputs in the host's memory, two slices.
    tiny("v6e:2x2", "dispatch=ragged", "remat=offload"),
    tiny("v5e:2x2", "mesh.data=2", slices=2),
)


def compiled(recipe: Recipe, is_whole: bool) -> tuple[str, bool]:
    """The row of the table, or what went wrong, and whether it fits. In a process of its own."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from dsjax.plan import chips, early, table
    from dsjax.plan.buffers import OutOfMemory
    from dsjax.plan.compiling import compile_step, finished
    from dsjax.run_file import load

    topology = chips.topology(recipe.topology, recipe.slices)
    by = finished if is_whole else early.planned
    outcome = compile_step(load(recipe.config, *recipe.changes), topology, by=by)
    if isinstance(outcome, OutOfMemory):
        return f"{recipe}: {table.refusal(outcome, topology)}", False
    return table.row(outcome), outcome.fits


def in_a_process(recipe: Recipe, is_whole: bool) -> tuple[str, bool]:
    """What `compiled` gives; a compiler that fails or dies is a row, too."""
    from dsjax.plan import early

    try:
        return early.apart(compiled, recipe, is_whole)
    except (ValueError, RuntimeError) as error:
        return f"{recipe}: {error}", False


def main(arguments: Sequence[str]) -> int:
    from dsjax.plan import table

    is_whole = "whole" in arguments
    words = [word for word in arguments if word not in ("tiny", "gpu", "whole")]
    recipes = TINY if "tiny" in arguments else GPU if "gpu" in arguments else LARGE
    chosen = [one for one in recipes if all(word in str(one) for word in words)]
    if not chosen:
        print(f"no recipe has {' and '.join(words)} in it; there are:")
        print(*recipes, sep="\n")
        return 2
    print(table.ROW_HEADER, flush=True)
    all_fit = True
    # Threads that wait for a process each. A large step takes several GB.
    with ThreadPoolExecutor(2) as pool:
        for row, fits in pool.map(lambda one: in_a_process(one, is_whole), chosen):
            print(row, flush=True)
            all_fit &= fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
