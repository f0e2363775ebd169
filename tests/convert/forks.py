"""Real processes of `convert_weights.py` that do not each take seconds to start.

A program of its own loads the code once and forks at every request. The forks are whole processes:
they are killed and they exit as those of a shell do. A dry run before the first one leaves them the
description of the model as well.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
import convert_weights
from dsjax.convert import casting, exporting, importing

sys.stdout = sys.stderr
answers, warm = os.fdopen(os.dup(1), "w"), False
for line in sys.stdin:
    request = json.loads(line)
    if request:
        warm = warm or not convert_weights.main([*request, "--dry-run"])
        process = os.fork()
        if not process:
            os.dup2(2, 1)
            os._exit(convert_weights.main(request))
        print(process, file=answers, flush=True)
    else:
        process, status = os.wait()
        print(process, os.waitstatus_to_exitcode(status), file=answers, flush=True)
"""


class Forks:
    """Starts processes and waits for their ends; to be used in a `with` statement."""

    def __init__(self):
        self._program = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self._program.communicate()

    def start(self, *arguments: object) -> int:
        """The id of a process that runs `convert_weights.py ARGUMENTS`."""
        return int(self._ask([str(argument) for argument in arguments]))

    def end(self) -> int:
        """Waits for any of the processes; the exit code, or minus the signal that ended it."""
        return int(self._ask(None).split()[1])

    def killed_when(self, reached: Callable[[], bool], *arguments: object) -> int:
        """Starts a process and kills it as soon as `reached()`; its exit code."""
        process = self.start(*arguments)
        while not reached() and Path(f"/proc/{process}/exe").exists():
            time.sleep(0.001)
        os.kill(process, 9)
        return self.end()

    def _ask(self, request: object) -> str:
        self._program.stdin.write(json.dumps(request) + "\n")
        self._program.stdin.flush()
        return self._program.stdout.readline()
