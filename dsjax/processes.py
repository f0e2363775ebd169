"""The processes of one run: they start together, agree on what they do, and end together.

A run of one process needs nothing of this, and every function here is then free. Those that
exchange something are collectives: all processes call them, in the same order.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

# How long a process may be silent before the others are told that it is dead, and end.
HEARTBEAT_SECONDS = 30
LOST_OTHERS = 4


class Agreed(ValueError):
    """An error that every process of the run raises, so that all end in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How this process finds the others; nothing of it belongs to the run.

    `coordinator`: "host:port" of process 0, `process_id` counts from 0. All None: the cluster says,
    if there is one. `num_processes=1` alone: there is none, and nobody is asked.
    """

    coordinator: str | None = None
    process_id: int | None = None
    num_processes: int | None = None
    heartbeat_seconds: int = HEARTBEAT_SECONDS

    def __post_init__(self):
        place, count = self.process_id, self.num_processes
        given = [part is not None for part in (self.coordinator, place, count)]
        if any(given) and not all(given) and given != [False, False, True]:
            raise ValueError(
                f"coordinator={self.coordinator} process_id={place} num_processes={count}: give "
                "all three, or none on a cluster that tells, or num_processes=1 for no others"
            )
        if count is not None and (count < 1 or not 0 <= (place or 0) < count):
            raise ValueError(
                f"process_id={place} num_processes={count}: processes are numbered from 0 to "
                "num_processes - 1"
            )
        if given == [False, False, True] and count != 1:
            raise ValueError(f"num_processes={count} needs coordinator=host:port and process_id=")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"coordinator={self.coordinator} must be host:port of process 0")
        if self.heartbeat_seconds < 1:
            raise ValueError(f"heartbeat_seconds={self.heartbeat_seconds} must be at least 1")


HELP = f"""\
coordinator        str  host:port of process 0; on TPU, Slurm, MPI and Kubernetes nothing is needed
process_id         int  which process this is, from 0
num_processes      int  how many there are; 1 alone: ask no cluster
heartbeat_seconds  int  all end when one was silent for so long, {HEARTBEAT_SECONDS} by default"""


def launch_keys(assignments: Sequence[str]) -> tuple[Launch, list[str]]:
    """The launch that `key=value` arguments describe, and the arguments that are about the run."""
    kinds = {field.name: field.type for field in dataclasses.fields(Launch)}
    given, others = {}, []
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        if key not in kinds:
            others.append(assignment)
        elif key == "coordinator":
            given[key] = text
        elif text.isdecimal():
            given[key] = int(text)
        else:
            raise ValueError(f"{key} wants a whole number, got {text!r}")
    return Launch(**given), others


def start(launch: Launch) -> None:
    """Meets the other processes, if there are any. To be called before jax sees a device.

    ValueError if a cluster was found or named, and its processes did not meet.
    """
    explicit = launch.coordinator is not None
    # Slurm tells a lone task, too, that it owns one device; it should have all of its node.
    is_lone_task = os.environ.get("SLURM_NTASKS") == "1"
    if not explicit and (launch.num_processes == 1 or is_lone_task):
        return
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            cluster_detection_method="deactivate" if explicit else None,
            heartbeat_timeout_seconds=launch.heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        # What jax says where neither a cluster nor its own variable names a coordinator.
        if not explicit and str(error) == "coordinator_address should be defined.":
            return
        raise ValueError(
            f"the processes of this run did not meet: {error}. Give coordinator=host:port "
            "process_id=I num_processes=N, or num_processes=1 to run without others"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints. Before `start`, every process does."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """What each process passed, in their order; must fit into JSON."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(raw.size))
    # Powers of two, so that few lengths are ever compiled.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: raw.size] = raw
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """What process 0 passed, in every process; must fit into JSON."""
    if jax.process_count() == 1:
        return value
    return gathered(value if is_first() else None)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What ends in a ValueError in one process is Agreed in all, which learn where and why.

    Around work that each process does for itself: else the others would wait for the failed one.
    """
    error = None
    try:
        yield
    except ValueError as mine:
        error = mine
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    reasons = gathered(None if error is None else str(error))
    for process, reason in enumerate(reasons):
        if reason is not None:
            raise Agreed(f"process {process}: {reason}") from error


def check_equal(what: str, value: str) -> None:
    """Agreed, in all processes, if one of them has another `value`."""
    values = gathered(value)
    others = [process for process, theirs in enumerate(values) if theirs != values[0]]
    if others:
        raise Agreed(
            f"{what} differs between process 0 and process {others[0]}; start all of them with "
            "the same command and the same files"
        )


class StopSignal:
    """SIGTERM or SIGINT to any process: all stop after the same step. A second one ends at once."""

    def __init__(self):
        self._asked = False
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            signal.signal(number, self._hear)

    def _hear(self, number: int, _: object) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)
        if jax.process_count() > 1:
            # Since `start`, jax listens to this one and tells the other processes.
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether `step`, the last that was started, ends the run; to be asked at every step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


class Watchdog:
    """Ends this process if of several processes one makes the others wait for too long.

    A process that died is noticed by its heartbeat. One that hangs still has it: then nothing but
    the clock tells.
    """

    def __init__(self, minutes: float):
        self._minutes, self._heard = minutes, time.monotonic()
        self._stopped = threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def hear(self) -> None:
        """Something was finished: the clock starts again."""
        self._heard = time.monotonic()

    def stop(self) -> None:
        """No step is waited for any more."""
        self._stopped.set()

    def _watch(self) -> None:
        while (left := self._minutes * 60 + self._heard - time.monotonic()) > 0:
            if self._stopped.wait(left):
                return
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        leave(
            LOST_OTHERS,
            f"nothing was finished for hang_minutes={self._minutes}; above is where it waits. "
            "A first step that compiles for so long needs a higher hang_minutes",
        )


def leave(code: int, reason: str) -> NoReturn:
    """Ends this process without waiting for the others, which end when they notice."""
    print(
        f"process {jax.process_index()} of {jax.process_count()} ends: {reason}. All processes of "
        "the run end with it; the same command continues at the last checkpoint",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly exit would wait for processes that wait for this one.
    os._exit(code)


@contextlib.contextmanager
def ending_together(*, but: type[Exception]) -> Iterator[None]:
    """An unforeseen error of one process, such as a lost connection, ends it at once, with a word.

    Not so errors of type `but`, which all processes raise, and where there is one process only.
    """
    try:
        yield
    except but:
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = f"a computation failed, most often because another process ended ({reason})"
        leave(LOST_OTHERS, reason)
