"""Recipes compiled for chips that are not here: `make plan`, or `make plan ARGS=tiny` in a minute.

    python benchmarks/plans.py [tiny] [WORD ...]

Prints a Markdown table: for each recipe memory of a device as the compiler has it, FLOPs, bytes
sent, and the least time of a step. WORDs choose among the recipes. Exit code 1 if one does not fit.
"""

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

WHOLE = ("optim.moments=bf16", "precision=bf16", "remat=full")


class Recipe(NamedTuple):
    """A run file and what is changed in it for `topology`."""

    config: str
    topology: str
    changes: tuple[str, ...]


def v3(topology: str, rows: int, *changes: str) -> Recipe:
    """The whole recipe of V3: MTP, groups, bias, sequence-wise loss, 4,096 tokens, BF16 moments."""
    batch = tuple(f"batch.{name}={rows}" for name in ("size", "micro", "ramp_from"))
    return Recipe("configs/v3.py", topology, (*WHOLE, *batch, *changes))


LARGE = (
    v3("v5p:8x8x8", 4 * 512, "mesh.expert=128"),
    v3("v5p:4x8x8", 2 * 256, "mesh.expert=128"),
    v3("v5p:4x4x8", 1 * 128, "mesh.expert=128"),
    v3("tpu7x:4x4x4", 1 * 128, "mesh.expert=128"),
    v3("h200:16x8", 1 * 128, "mesh.expert=128"),
)
TINY = tuple(
    Recipe("configs/tiny_v3.py", topology, ("precision=bf16", "mesh.expert=2"))
    for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
)


def compiled(recipe: Recipe) -> tuple[str, bool]:
    """The row of the table, or what went wrong, and whether it fits. In a process of its own."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from dsjax.plan import chips, table
    from dsjax.plan.buffers import OutOfMemory
    from dsjax.plan.compiling import compile_step
    from dsjax.run_file import load

    topology = chips.topology(recipe.topology)
    outcome = compile_step(load(recipe.config, *recipe.changes), topology)
    if isinstance(outcome, OutOfMemory):
        return f"{recipe}: {table.refusal(outcome, topology)}", False
    return table.row(outcome), outcome.fits


def main(arguments: Sequence[str]) -> int:
    from dsjax.plan import table

    is_tiny = "tiny" in arguments
    words = [word for word in arguments if word != "tiny"]
    recipes = TINY if is_tiny else LARGE
    chosen = [one for one in recipes if all(word in str(one) for word in words)]
    if not chosen:
        print(f"no recipe has {' and '.join(words)} in it; there are:")
        print(*recipes, sep="\n")
        return 2
    print(table.ROW_HEADER, flush=True)
    # A large step takes 10 GB and both cores.
    pool = ProcessPoolExecutor(
        2 if is_tiny else 1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    all_fit = True
    with pool:
        for row, fits in pool.map(compiled, chosen):
            print(row, flush=True)
            all_fit &= fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
