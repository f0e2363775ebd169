"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepProgress:
    """Step, loss, tokens/s and time left. Without a terminal, a line every `every` steps."""

    def __init__(self, *, first: int, steps: int, every: int):
        self._first, self._steps, self._every = first, steps, every
        self._console = Console()
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s "),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=first, loss="-", rate="-")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows the figures of a finished step."""
        rate = f"{tokens_per_second:,.0f}"
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=rate)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._steps):
            done = max(step - self._first, 1)
            left = (time.monotonic() - self._began) / done * (self._steps - step)
            self.say(
                f"step {step}/{self._steps}  loss {loss:.4f}  {rate} tokens/s  {left:.0f} s left"
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
