"""The worker's side of a benchmark that takes turns: JSON lines on standard output."""

import json
import resource
import sys
import time
from collections.abc import Callable


def take_turns(
    step: Callable[[], None],
    finish: Callable[[], None] = lambda: None,
    *,
    versions: dict[str, str],
    warmup: int = 3,
) -> None:
    """Times turns of as many steps as standard input asks, in seconds per step.

    `step` may return before its work is done; `finish` waits for all of it.
    """

    def turn(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        finish()
        return time.perf_counter() - began

    first = turn(1)
    turn(warmup)
    print(json.dumps({"first_step_s": first, "versions": versions}), flush=True)
    for line in sys.stdin:
        steps = int(line)
        print(json.dumps({"seconds": turn(steps) / steps}), flush=True)
    # Linux counts kilobytes, macOS bytes.
    unit = 1024**2 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps({"peak_rss_mb": peak}), flush=True)
