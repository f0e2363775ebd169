"""Times a train step on CPU against transformers + torch, same tiny model, taking turns.

    make bench            (or: python benchmarks/train_step.py --rounds 7)

Both sides: FP32, AdamW, batch 4 x 128 random tokens, two threads on two cores. Every contender is a
process of its own that first compiles and warms up; then they take turns, a few steps each, so that
a machine whose speed drifts slows them all alike. Ours also moves the router bias, adds the
sequence-wise balance loss and clips gradients; the peers do none of these.
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
TOKENS = 4 * 128
THREADS = 2

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
        """Lets it take `steps` steps, and keeps their times."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.seconds += self._answer()["seconds"]

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
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

    contenders = [Contender("dsjax", [sys.executable, str(HERE / "dsjax_worker.py")])]
    peers = [peer for peer in options.peers.split(",") if peer and peer != "none"]
    if peers and not ORACLE_PYTHON.is_file():
        raise SystemExit("the peers need .venv-oracle; make it with: make oracle")
    for peer in peers:
        worker = [str(ORACLE_PYTHON), str(HERE / "transformers_worker.py"), peer]
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
    ours = statistics.median(contenders[0].seconds)
    for contender in contenders:
        middle = statistics.median(contender.seconds)
        rates = (TOKENS / t for t in (middle, min(contender.seconds), max(contender.seconds)))
        figures = " | ".join(f"{rate:,.0f}" for rate in rates)
        memory = contender.close()["peak_rss_mb"]
        first = contender.ready["first_step_s"]
        print(
            f"| {contender.name} | {figures} | {first:.1f} | {memory:,.0f} | {middle / ours:.2f} |"
        )
    print("\nratio: our tokens/s over theirs (medians of this run)")


if __name__ == "__main__":
    main()
