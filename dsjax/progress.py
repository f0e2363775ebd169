"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class StepProgress:
    """Step, loss, tokens/s and time left. Without a terminal, a line every `every` steps.

    `quiet` says nothing at all: of several processes only one is heard.
    """

    def __init__(self, *, first: int, steps: int, every: int, quiet: bool = False):
        self._steps, self._every = steps, every
        self._console = Console(quiet=quiet)
        # When the first step of this start was done: before that it compiled.
        self._began: float | None = None
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s "),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=first, loss="-", rate="-")

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows the figures of a finished step."""
        rate = f"{tokens_per_second:,.0f}"
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=rate)
        now = time.monotonic()
        if self._began is None:
            self._first, self._began = step, now
        if not self._console.is_terminal and (step % self._every == 0 or step == self._steps):
            line = f"step {step}/{self._steps}  loss {loss:.4f}  {rate} tokens/s"
            if step > self._first:
                left = (now - self._began) / (step - self._first) * (self._steps - step)
                line += f"  {left:.0f} s left"
            self.say(line)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class ByteProgress:
    """Tensors, bytes, rate and time left. Without a terminal, a line every `every` seconds.

    Whatever was there before it began (`done_tensors`, `done_bytes`) does not count as speed. Any
    thread may report.
    """

    def __init__(
        self,
        what: str,
        *,
        tensors: int,
        num_bytes: int,
        done_tensors: int = 0,
        done_bytes: int = 0,
        every: float = 10.0,
    ):
        self._what, self._tensors, self._bytes, self._every = what, tensors, num_bytes, every
        self._done_tensors, self._done_bytes, self._first = done_tensors, done_bytes, done_bytes
        self._console, self._lock = Console(), threading.Lock()
        self._began = self._told = time.monotonic()
        self._bar = Progress(
            TextColumn(what),
            TextColumn("{task.fields[tensors]}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            what, total=num_bytes, completed=done_bytes, tensors=self._count()
        )

    def __enter__(self) -> "ByteProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if not self._console.is_terminal:
            self.say(self._line())

    def advance(self, num_bytes: int, tensors: int = 0) -> None:
        """Adds to what is done."""
        with self._lock:
            self._done_bytes += num_bytes
            self._done_tensors += tensors
            self._bar.update(self._task, completed=self._done_bytes, tensors=self._count())
            now = time.monotonic()
            if not self._console.is_terminal and now - self._told >= self._every:
                self._told = now
                self.say(self._line())

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _count(self) -> str:
        return f"{self._done_tensors:,}/{self._tensors:,} tensors"

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done_bytes - self._first) / seconds
        left = f"{(self._bytes - self._done_bytes) / rate:.0f} s left" if rate else "waiting"
        return (
            f"{self._what}  {self._count()}  {in_bytes(self._done_bytes)} of "
            f"{in_bytes(self._bytes)}  {in_bytes(rate)}/s  {left}"
        )


def in_bytes(number: int | float) -> str:
    """As in 4.3 GB; the powers are of ten, as file sizes are told."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} bytes" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"
