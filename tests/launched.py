"""Real processes of one run on this machine, as a launcher would start them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a process ended, and all that it wrote."""

    code: int
    output: str
    errors: str


class Launched:
    """`count` processes of `python *command`, each with `devices` virtual devices."""

    def __init__(self, folder: Path, command: list[str], *, count: int, devices: int):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            # jaxlib 0.12: a CPU program of several devices that comes out of the cache may run its
            # collectives in another order on each device, and then waits for ever. (2026-11)
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "PYTHONPATH": str(ROOT),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.processes, self._files = [], []
        for place in range(count):
            launch = [f"coordinator=127.0.0.1:{port}", f"process_id={place}"]
            launch = [*launch, f"num_processes={count}"] if count > 1 else []
            # Files, as a pipe that nobody reads would stop its writer.
            self._files.append((folder / f"output{place}", folder / f"errors{place}"))
            with self._files[-1][0].open("w") as output, self._files[-1][1].open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *launch],
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=errors,
                    )
                )

    def until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Waits until `condition` holds; all processes must live as long."""
        deadline = time.monotonic() + seconds
        while not condition():
            for process, (_, errors) in zip(self.processes, self._files, strict=True):
                assert process.poll() is None, errors.read_text()
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)

    def ended(self, seconds: float = 240) -> list[Ended]:
        """All of them, after they ended by themselves."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return [
            Ended(process.returncode, output.read_text(), errors.read_text())
            for process, (output, errors) in zip(self.processes, self._files, strict=True)
        ]


def records(run_dir: Path) -> list[dict]:
    """The metrics so far; the last line of a process that is still writing may be half there."""
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def drawn_moments(state: Any) -> Any:
    """A training state whose optimizer holds no number twice; at step 0 all are zero.

    Of several processes each has its part of the same numbers.
    """
    rng = np.random.default_rng(0)

    def drawn(old: jax.Array) -> jax.Array:
        values = (rng.random(old.shape) * 100).astype(old.dtype)
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: values[index])

    return state._replace(opt_state=jax.tree.map(drawn, state.opt_state))
