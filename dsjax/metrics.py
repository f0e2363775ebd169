"""Metrics of a run: JSON lines that read back bit-identical, and the same as TensorBoard events."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsjax import config

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl` and writes TensorBoard events beside it.

    `position` is the size of the file in bytes and belongs into a checkpoint: a log opened at that
    position forgets the lines of steps that will be run again.
    """

    def __init__(self, run_dir: Path, *, position: int = 0, step: int = 0):
        from tensorboardX import SummaryWriter

        self._file = (run_dir / METRICS_FILE).open("ab")
        self._file.truncate(position)
        self._file.seek(0, 2)
        purge = step + 1 if position else None
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    @property
    def position(self) -> int:
        return self._file.tell()

    def write(self, record: dict) -> None:
        """Writes one record, which must have a `step`; floats keep all their digits."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._events.add_scalar(name, value, record["step"])
            elif isinstance(value, list):
                for layer, item in enumerate(value):
                    self._events.add_scalar(f"{name}/{layer}", item, record["step"])

    def close(self) -> None:
        self._events.close()
        self._file.close()


def read(run_dir: Path) -> list[dict]:
    """All records of a run so far."""
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def _moe_stacks(model: config.Model) -> list[config.Moe]:
    """The MoE specs in the order of a step's loads: each place in a group's pattern, then MTP."""
    pattern = [block for group in model.layers for block in group.pattern]
    return [block.ffn for block in (*pattern, *model.mtp) if isinstance(block.ffn, config.Moe)]


def load_statistics(loads: Sequence[np.ndarray], model: config.Model, tokens: float) -> dict:
    """What a step's expert loads say, a list entry per MoE layer; {} for a dense model.

    `load_max_over_mean`: 1 is even. `load_entropy`: in units of ln E, 1 is even.
    `dropped_tokens`: the token-expert pairs of `tokens` tokens that no expert counted.
    """
    max_over_mean, entropy, dropped = [], [], 0.0
    for stack, spec in zip(loads, _moe_stacks(model), strict=True):
        for load_E in np.atleast_2d(np.asarray(stack, np.float64)):
            share_E = load_E / load_E.sum()
            used_E = share_E[share_E > 0]
            max_over_mean.append(float(share_E.max() * len(share_E)))
            entropy.append(float(-(used_E * np.log(used_E)).sum() / math.log(len(share_E))))
            dropped += tokens * spec.num_chosen - float(load_E.sum())
    if not max_over_mean:
        return {}
    return {
        "load_max_over_mean": max_over_mean,
        "load_entropy": entropy,
        "dropped_tokens": dropped,
    }
