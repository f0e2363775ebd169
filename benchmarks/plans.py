"""Recipes compiled for chips that are not here: `make plan`, or `make plan ARGS=tiny` in a minute.

    python benchmarks/plans.py [tiny] [WORD ...]

Prints the Markdown table of docs/plans.md: for each recipe memory of a device as the compiler has
it, FLOPs, bytes sent, and the least time of a step. WORDs choose among the recipes. Each is
compiled in a process of its own. Exit code 1 if one does not fit or does not compile.
"""

import multiprocessing
import sys
import traceback
from collections.abc import Sequence
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


def compiled(recipe: Recipe, results: multiprocessing.Queue) -> None:
    """Puts (row of the table, whether it fits) on the queue; runs in a process of its own."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from dsjax.plan import chips, table
    from dsjax.plan.buffers import OutOfMemory
    from dsjax.plan.compiling import compile_step
    from dsjax.run_file import load

    topology = chips.topology(recipe.topology)
    try:
        outcome = compile_step(load(recipe.config, *recipe.changes), topology)
    except Exception:
        results.put((traceback.format_exc(), False))
        return
    if isinstance(outcome, OutOfMemory):
        results.put((f"{recipe}: {table.refusal(outcome, topology)}", False))
    else:
        results.put((table.row(outcome), outcome.fits))


def main(arguments: Sequence[str]) -> int:
    from dsjax.plan import table

    recipes = TINY if "tiny" in arguments else LARGE
    words = [word for word in arguments if word != "tiny"]
    chosen = [one for one in recipes if all(word in str(one) for word in words)]
    print(table.ROW_HEADER, flush=True)
    context, all_fit = multiprocessing.get_context("spawn"), bool(chosen)
    for recipe in chosen:
        results = context.Queue()
        process = context.Process(target=compiled, args=(recipe, results))
        process.start()
        row, fits = results.get()
        process.join()
        print(row, flush=True)
        all_fit &= fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
