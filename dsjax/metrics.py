"""Metrics of a run: JSON lines that read back bit-identical, and the same as TensorBoard events."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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


def load_statistics(loads: Sequence[np.ndarray]) -> dict:
    """What a step's expert loads say, a list entry per MoE layer; {} for a dense model.

    `load_max_over_mean`: 1 is even. `load_entropy`: in units of ln E, 1 is even.
    """
    max_over_mean, entropy = [], []
    for stack in loads:
        for load_E in np.atleast_2d(np.asarray(stack, np.float64)):
            share_E = load_E / load_E.sum()
            used_E = share_E[share_E > 0]
            max_over_mean.append(float(share_E.max() * len(share_E)))
            entropy.append(float(-(used_E * np.log(used_E)).sum() / math.log(len(share_E))))
    if not max_over_mean:
        return {}
    return {"load_max_over_mean": max_over_mean, "load_entropy": entropy}
