"""Does FP8 train as well as BF16? Same data, same seed, several arithmetics; a table and a picture.

    python benchmarks/fp8_training.py OUT [seeds=0,1,2] [variants=bf16,fp8] [steps=1000] [rows=4]

Trains `configs/tiny_fp8.py` on CPU, `rows` of 128 bytes to a step. FP8 is emulated there: what a
chip would multiply, summed in FP32. "nudged" is the control: BF16 from weights that differ by one
rounding to BF16. It shows how far two trainings part that nothing tells apart. One process to a
core. Losses go to OUT as JSON; what is there already is not trained again. OUT/fp8.png and the
table hold all that OUT has.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_fp8.py"
VARIANTS = ("bf16", "nudged", "fp8", "fp8_ue8m0", "per_tensor", "unpromoted")
WINDOW = 100


def products(variant: str):
    """The arithmetic of `variant`."""
    from fp8_variants import PerTensor, Unpromoted

    from dsjax.nn.precision import PRECISIONS

    own = {name: precision.products for name, precision in PRECISIONS.items()}
    others = {"nudged": own["bf16"], "per_tensor": PerTensor(), "unpromoted": Unpromoted()}
    return (own | others)[variant]


def pin(cores) -> None:
    os.sched_setaffinity(0, {cores.get()})


def train(path: Path, variant: str, seed: int, steps: int, size: int) -> tuple[str, int, float]:
    """Writes the losses of one training to `path`; the mean of the last window for a line."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    from dsjax.data import open_data
    from dsjax.losses import Batch
    from dsjax.run_file import load
    from dsjax.run_folder import replace_text
    from dsjax.train_step import init_state, make_train_step

    changes = (f"seed={seed}", f"steps={steps}", f"batch.size={size}", "precision=bf16")
    run = load(CONFIG, *changes)
    data = open_data(run.data, length=run.batch.length, vocab_size=run.model.vocab_size)
    rows = data.train_rows(run.seed)
    step = make_train_step(run, products(variant))
    state = jax.jit(lambda: init_state(run))()
    if variant == "nudged":
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), state.model)
        state = state._replace(model=rounded)
    losses = []
    for number in range(steps):
        if number % 100 == 0:
            last = f", loss {losses[-1]:.4f}" if losses else ""
            print(f"{variant}, seed {seed}: step {number}/{steps}{last}", flush=True)
        its = rows.take(run.batch.size, set(range(run.batch.size)))
        names = ("tokens_T", "segments_T", "positions_T")
        arrays = (np.stack([getattr(row, name) for row in its])[None] for name in names)
        state, values = step(state, Batch(*map(jnp.asarray, arrays)), jnp.int32(1))
        losses.append(float(values["loss"]))
    replace_text(path, json.dumps({"variant": variant, "seed": seed, "losses": losses}))
    return variant, seed, windows(losses)[-1]


def windows(losses: Sequence[float]) -> list[float]:
    """Means over consecutive windows of steps; the last may be shorter."""
    cut = (losses[i : i + WINDOW] for i in range(0, len(losses), WINDOW))
    return [sum(window) / len(window) for window in cut]


def differences(losses: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of each window, relative to the other training's."""
    return [a / b - 1 for a, b in zip(windows(losses), windows(base), strict=True)]


def table(found: dict[tuple[str, int], list[float]]) -> str:
    """Markdown: where each training ends, and how far it is from BF16's on the way."""
    lines = [
        f"| arithmetic | seed | loss, last {WINDOW} steps | all steps beside BF16's "
        f"| largest difference over {WINDOW} steps |",
        "|---|---|---|---|---|",
    ]
    for (variant, seed), losses in sorted(found.items(), key=lambda one: VARIANTS.index(one[0][0])):
        base = found.get(("bf16", seed))
        beside, largest = "", ""
        if base and variant != "bf16":
            apart = differences(losses, base)
            beside = f"{sum(losses) / sum(base) - 1:+.3%}"
            largest = f"{max(apart, key=abs):+.3%}"
        lines.append(f"| {variant} | {seed} | {windows(losses)[-1]:.4f} | {beside} | {largest} |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, int], list[float]], path: Path) -> None:
    """Losses, and differences to BF16 with the paper's bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    colors = dict(zip(VARIANTS, plt.colormaps["tab10"].colors, strict=False))
    for (variant, seed), losses in found.items():
        curve = windows(losses)
        steps = [WINDOW * (i + 1) for i in range(len(curve))]
        is_first = seed == min(its for name, its in found if name == variant)
        label, style = variant if is_first else None, {"color": colors[variant], "linewidth": 1}
        left.plot(steps, curve, label=label, **style)
        if variant != "bf16" and ("bf16", seed) in found:
            apart = [100 * one for one in differences(losses, found["bf16", seed])]
            right.plot(steps, apart, label=label, **style)
    for bound in (-0.25, 0.25):
        right.axhline(bound, color="grey", linestyle="--", linewidth=1)
    left.set(title="Loss", xlabel="step", ylabel=f"nats per token, means of {WINDOW} steps")
    right.set(title="Relative difference to BF16", xlabel="step", ylabel="%")
    for axis in (left, right):
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    unfinished = path.with_suffix(".partial.png")
    figure.savefig(unfinished, dpi=100)
    plt.close(figure)
    os.replace(unfinished, path)


def main(arguments: Sequence[str]) -> int:
    out, *rest = arguments or [""]
    options = {"seeds": "0,1,2", "variants": "bf16,fp8", "steps": "1000", "rows": "4"}
    for one in rest:
        key, _, value = one.partition("=")
        if key not in options:
            print(f"{one}: there are {', '.join(f'{name}=' for name in options)}")
            return 2
        options[key] = value
    chosen = options["variants"].split(",")
    if not out or not set(chosen) <= set(VARIANTS):
        print(f"{__doc__}\nvariants: {', '.join(VARIANTS)}")
        return 2
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    steps, size = int(options["steps"]), int(options["rows"])
    seeds = [int(seed) for seed in options["seeds"].split(",")]
    wanted = [
        (folder / f"{variant}-{seed}-{steps}-{size}.json", variant, seed, steps, size)
        for seed in seeds
        for variant in chosen
    ]
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    queue = context.Queue()
    for core in cores:
        queue.put(core)
    with ProcessPoolExecutor(
        len(cores), mp_context=context, initializer=pin, initargs=(queue,)
    ) as pool:
        tasks = [pool.submit(train, *one) for one in wanted if not one[0].exists()]
        for task in tasks:
            variant, seed, loss = task.result()
            print(f"{variant}, seed {seed}: done, loss {loss:.4f}", flush=True)
    read = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-{steps}-{size}.json"))]
    found = {(one["variant"], one["seed"]): one["losses"] for one in read}
    draw(found, folder / "fp8.png")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
