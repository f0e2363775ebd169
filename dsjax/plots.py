"""The picture of a run: loss on training and held-out text, and how evenly experts were used."""

import os
from pathlib import Path


def loss_curve(records: list[dict], path: Path, *, bigram_bits: float | None) -> None:
    """Writes a PNG of a run's metrics: losses in nats per token and bits per byte, expert load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held_out = [record for record in records if "held_out_bits_per_byte" in record]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    steps = [record["step"] for record in records]
    left.plot(steps, [record["loss"] for record in records], label="training", linewidth=1)
    if "mtp1_loss" in records[-1]:
        left.plot(steps, [r["mtp1_loss"] for r in records], label="training, MTP 1", linewidth=1)
    evaluated = [record["step"] for record in held_out]
    left.plot(evaluated, [r["held_out_loss"] for r in held_out], "o-", label="held out")
    left.set(title="Loss", xlabel="step", ylabel="nats per token")
    middle.plot(evaluated, [r["held_out_bits_per_byte"] for r in held_out], "o-", label="held out")
    if bigram_bits is not None:
        middle.axhline(bigram_bits, color="grey", linestyle="--", label="bigram entropy")
    middle.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
    loads = [record for record in records if record.get("load_max_over_mean")]
    for layer in range(len(loads[-1]["load_max_over_mean"]) if loads else 0):
        curve = [record["load_max_over_mean"][layer] for record in loads]
        right.plot([r["step"] for r in loads], curve, linewidth=1, label=f"MoE layer {layer}")
    right.axhline(1.0, color="grey", linestyle="--", label="even")
    right.set(title="Expert load", xlabel="step", ylabel="busiest expert / mean")
    for axis in (left, middle, right):
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    unfinished = path.with_suffix(".partial.png")
    figure.savefig(unfinished, dpi=100)
    plt.close(figure)
    os.replace(unfinished, path)
