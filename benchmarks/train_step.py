"""Times a train step on CPU against transformers + torch, same tiny model, taking turns.

    make bench            (or: python benchmarks/train_step.py --rounds 7)
    make bench ARGS=--meshes

Both sides: FP32, AdamW, batch 4 x 128 random tokens, two threads on two cores. Every contender is a
process of its own that first compiles and warms up; then they take turns, a few steps each, so that
a machine whose speed drifts slows them all alike. A turn is timed as a whole: as in train.py, ours
starts a step before it reads the loss of the one before. Ours also moves the router bias, adds the
sequence-wise balance loss and clips gradients; the peers do none of these. With `--meshes` our
step alone, batch 8 x 128, on one device and on meshes of eight virtual ones, which share the cores:
what a mesh costs, not what it would gain.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ORACLE_PYTHON = HERE.parent / ".venv-oracle" / "bin" / "python"
# In a folder of their own: transformers looks for a package called like our kernels.py.
WORKERS = HERE / "train_step_workers"
ROWS, MESH_ROWS, LENGTH = 4, 8, 128
THREADS = 2
# Each compiles for half a minute on two cores before the first turn.
MESHES = (
    "data=1",
    "fsdp=8",
    "expert=8",
    "tensor=8",
    "context=8",
    "data=2 fsdp=2 expert=2",
)

PEERS = ("eager", "batched_mm", "grouped_mm", "grouped_mm+compile")


class Contender:
    """A worker process: answers one JSON line when ready, and one for every turn."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        environment = os.environ | {
            "OMP_NUM_THREADS": str(THREADS),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(HERE.parent),
        }
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self._answer()
        self.seconds: list[float] = []

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)

    def turn(self, steps: int) -> None:
        """Lets it take `steps` steps, and keeps the time of one."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.seconds.append(self._answer()["seconds"])

    def close(self) -> dict:
        """Its last words: peak memory."""
        self._process.stdin.close()
        last = self._answer()
        self._process.wait()
        return last


def main() -> None:
    parser = argparse.ArgumentParser(description="train step: dsjax against transformers, on CPU")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of them, or none")
    parser.add_argument("--meshes", action="store_true", help="our step on meshes, without peers")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

    def ours(name: str, rows: int, *axes: str) -> Contender:
        worker = [sys.executable, str(WORKERS / "with_dsjax.py"), str(rows)]
        return Contender(name, [*worker, *axes])

    if options.meshes:
        rows, peers = MESH_ROWS, []
        contenders = [ours(mesh, rows, *mesh.split()) for mesh in MESHES]
    else:
        rows, contenders = ROWS, [ours("dsjax", ROWS)]
        peers = [peer for peer in options.peers.split(",") if peer and peer != "none"]
    if peers and not ORACLE_PYTHON.is_file():
        raise SystemExit("the peers need .venv-oracle; make it with: make oracle")
    for peer in peers:
        worker = [str(ORACLE_PYTHON), str(WORKERS / "with_transformers.py"), peer]
        contenders.append(Contender(f"transformers {peer}", worker))
    for _ in range(options.rounds):
        for contender in contenders:
            contender.turn(options.steps)

    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    versions |= next((c.ready["versions"] for c in contenders[1:]), {})
    print(f"{platform.machine()}, {THREADS} threads, Python {platform.python_version()}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"command: {' '.join(sys.argv)}\n")
    print("| contender | tokens/s, median | fastest | slowest | first step s | peak MB | ratio |")
    print("|---|---|---|---|---|---|---|")
    first_median = statistics.median(contenders[0].seconds)
    for contender in contenders:
        middle = statistics.median(contender.seconds)
        seconds = middle, min(contender.seconds), max(contender.seconds)
        rates = (rows * LENGTH / t for t in seconds)
        figures = " | ".join(f"{rate:,.0f}" for rate in rates)
        memory = contender.close()["peak_rss_mb"]
        first = contender.ready["first_step_s"]
        cells = f"{first:.1f} | {memory:,.0f} | {middle / first_median:.2f}"
        print(f"| {contender.name} | {figures} | {cells} |")
    print(f"\nratio: tokens/s of {contenders[0].name} over each one's (medians of this run)")


if __name__ == "__main__":
    main()
