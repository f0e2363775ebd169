"""Stops a run whose loss has gone wrong, while its last checkpoint is still good."""

import math
from collections import deque
from statistics import median

from dsjax.run import Guard


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
