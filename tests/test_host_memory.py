"""Freed pages stay with the process: seen in the page faults of a process of its own."""

import subprocess
import sys

import pytest

from dsjax.host_memory import keep_freed_pages

MEASURE = """
import resource, sys
import numpy as np
from dsjax.host_memory import keep_freed_pages

if sys.argv[1] == "keep":
    assert keep_freed_pages()
np.ones(8_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    ran = subprocess.run([sys.executable, "-c", MEASURE, mode], capture_output=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_large_blocks_are_not_mapped_anew():
    # 64 MB are at least 32 huge pages, five times.
    assert faults("as it is") >= 150
    assert faults("keep") < 50


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_pages() is False
