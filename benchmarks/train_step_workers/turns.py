"""The worker's side of a benchmark that takes turns: JSON lines on standard output."""

import json
import resource
import sys
import time
from collections.abc import Callable


def take_turns(step: Callable[[], None], *, versions: dict[str, str], warmup: int = 3) -> None:
    """Times `step` (which must block until it is done) as often as standard input asks."""
    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    for _ in range(warmup):
        step()
    print(json.dumps({"first_step_s": first, "versions": versions}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds}), flush=True)
    # Linux counts kilobytes, macOS bytes.
    unit = 1024**2 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps({"peak_rss_mb": peak}), flush=True)
