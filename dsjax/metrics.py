"""Metrics of a run: JSON lines that read back bit-identical, and the same as TensorBoard events."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl` and writes TensorBoard events beside it.

    Opened after `step`, it forgets the lines of later steps, which will run again. `record` is the
    line of that step, kept in the checkpoint: a run killed right after saving has not written it.
    """

    def __init__(self, run_dir: Path, *, step: int = 0, record: dict | None = None):
        from tensorboardX import SummaryWriter

        file = run_dir / METRICS_FILE
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        # The last line of a process that was killed may be half there.
        steps = [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
        kept = sum(known <= step for known in steps)
        self._file = file.open("ab")
        self._file.truncate(sum(len(line) for line in lines[:kept]))
        self._file.seek(0, 2)
        purge = step + 1 if step else None
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if record is not None and step not in steps:
            self.write(record)

    def write(self, record: dict) -> None:
        """Writes one record, which must have a `step`; floats keep all their digits.

        JSON has no number for nan and infinities: they are written as null.
        """
        line = json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
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


class Goodput:
    """The share of the time since the run first began that went into steps its checkpoints hold.

    Stops, restarts, compilation, saving, evaluation and steps that had to be done again are what
    is missing to 1. `productive_seconds` belongs into a checkpoint.
    """

    def __init__(self, began: float, productive_seconds: float = 0.0):
        """`began`: when, in seconds since 1970."""
        self._began, self.productive_seconds = began, productive_seconds

    def after(self, seconds: float) -> float:
        """The share after one more step, which took `seconds`."""
        self.productive_seconds += seconds
        return self.productive_seconds / max(time.time() - self._began, self.productive_seconds)


def read(run_dir: Path) -> list[dict]:
    """All records of a run so far, with nan for null."""
    return [
        {name: _number(value) for name, value in json.loads(line).items()}
        for line in (run_dir / METRICS_FILE).read_text().splitlines()
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    return math.nan if value is None else value


def load_statistics(loads: Sequence[np.ndarray], *, devices: int = 1) -> dict:
    """What a step's expert loads say, a list entry per MoE layer; {} for a dense model.

    `load_max_over_mean`: 1 is even. `load_entropy`: in units of ln E, 1 is even, and so
    is the load of a single expert.
    `load_device_max_over_mean`: of the sums over the experts of each of the `devices` that share
    them; the others wait for the fullest one.
    """
    max_over_mean, entropy, device_max_over_mean = [], [], []
    for stack in loads:
        for load_E in np.atleast_2d(np.asarray(stack, np.float64)):
            share_E = load_E / load_E.sum()
            used_E = share_E[share_E > 0]
            max_over_mean.append(float(share_E.max() * len(share_E)))
            of_device = share_E.reshape(devices, -1).sum(1)
            device_max_over_mean.append(float(of_device.max() * devices))
            most = math.log(len(share_E))
            entropy.append(float(-(used_E * np.log(used_E)).sum() / most) if most else 1.0)
    if not max_over_mean:
        return {}
    return {
        "load_max_over_mean": max_over_mean,
        "load_entropy": entropy,
        "load_device_max_over_mean": device_max_over_mean,
    }
