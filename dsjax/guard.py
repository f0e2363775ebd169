"""Stops a run whose loss has gone wrong, while its last checkpoint is still good."""

import math
from collections import deque
from statistics import median

from dsjax.run import Guard


def ways_out(loss: float, grad_norm: float, anew: str | None) -> str:
    """What a person can do about a complaint over these values.

    `anew`: the keys of a new run that begins with the newest checkpoint; None: nothing is saved.
    """
    calmer = "a lower optim.learning_rate.peak or optim.clip_norm"
    if anew is None:
        gentler = f"repeat the command with {calmer}: nothing is saved yet, so it begins again"
    else:
        gentler = (
            "if the losses until the last checkpoint were good, begin a new run from its weights "
            f"with {calmer}: {anew} (moments, schedules and the order of the data begin again)"
        )
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return (
            "No checkpoint holds this step. Look at these documents; if a spike is expected here, "
            f"repeat the command with a higher guard.spike; if not, {gentler}."
        )
    return (
        "No checkpoint holds this step, and unless a device was at fault, the same command comes "
        f"to it again. Look at these documents, then {gentler}."
    )


class LossGuard:
    """Watches every step's loss: stops if it is not finite, or towers over the recent ones."""

    def __init__(self, config: Guard, recent: list[float]):
        self._config = config
        self._recent = deque(recent[-config.window :], maxlen=config.window)

    def complaint(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with this step, or None."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss} and gradient norm {grad_norm} are not finite"
        if len(self._recent) == self._config.window:
            usual = median(self._recent)
            if loss > self._config.spike * usual:
                return (
                    f"loss {loss:.4f} is more than guard.spike={self._config.spike} times the "
                    f"median {usual:.4f} of the last {self._config.window} steps"
                )
        self._recent.append(loss)
        return None
