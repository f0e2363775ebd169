"""What the GPU did while it was timed: its clocks, power and temperature, and what held it back.

nvidia-smi reads them many times a second while all contenders of a shape take turns; its power is a
mean over about a second. It only reads: nothing here sets a clock or a limit.
"""

import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from typing import NamedTuple

FIELDS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
EVERY_MS = 50
# A whole line of `--format=csv,noheader,nounits`; the last one may be cut off.
LINE = re.compile(r"(\d+), (\d+), ([\d.]+), (\d+), (0x[0-9a-fA-F]{16})")
# Bits of the last field (NVML's nvmlClocksEventReasons).
IDLE = 0x1
REASONS = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


class Reading(NamedTuple):
    sm_mhz: int
    memory_mhz: int
    watts: float
    celsius: int
    reasons: int


def readings(text: str) -> list[Reading]:
    """The whole lines of what nvidia-smi said; anything else among them is left out."""
    found = filter(None, map(LINE.fullmatch, text.splitlines()))
    return [
        Reading(int(sm), int(memory), float(watts), int(celsius), int(reasons, 16))
        for sm, memory, watts, celsius, reasons in (match.groups() for match in found)
    ]


def summary(text: str) -> str:
    """One line about the readings under load: those at which the GPU was not idle."""
    taken = [one for one in readings(text) if not one.reasons & IDLE]
    if not taken:
        return f"no clocks: {(text.splitlines() or ['nvidia-smi said nothing'])[0]}"
    sm, memory, watts, celsius, masks = zip(*taken, strict=True)
    held = [
        f"{name} in {sum(bool(mask & bit) for mask in masks) / len(masks):.0%}"
        for bit, name in REASONS.items()
        if any(mask & bit for mask in masks)
    ]
    return (
        f"SM {statistics.median(sm):.0f} MHz (least {min(sm)}), "
        f"memory {statistics.median(memory):.0f} MHz (least {min(memory)}), "
        f"{statistics.median(watts):.0f} W (most {max(watts):.0f}), at most {max(celsius)} C; "
        f"held back by {', '.join(held) or 'nothing'}; {len(taken)} readings"
    )


def watched[T](work: Callable[[], T]) -> tuple[T, str]:
    """The result of `work`, and the summary of what the GPU did meanwhile."""
    with tempfile.TemporaryFile("w+") as said:
        try:
            watcher = subprocess.Popen(
                [*_query(FIELDS), f"--loop-ms={EVERY_MS}"], stdout=said, stderr=subprocess.STDOUT
            )
        except OSError as error:
            return work(), f"no clocks: {error}"
        try:
            result = work()
        finally:
            watcher.terminate()
            watcher.wait()
        said.seek(0)
        return result, summary(said.read())


def card() -> str:
    """Driver, power limit and highest SM clock."""
    try:
        found = subprocess.run(
            _query("driver_version,power.limit,clocks.max.sm"),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nothing known of the card: {error}"
    driver, watts, mhz = found.stdout.strip().split(", ")
    return f"driver {driver}, power limit {watts} W, SM clock at most {mhz} MHz"


def _query(fields: str) -> list[str]:
    # nvidia-smi counts all GPUs of the machine, jax those that it may see.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return [
        "nvidia-smi",
        f"--id={first}",
        f"--query-gpu={fields}",
        "--format=csv,noheader,nounits",
    ]
