"""What is told of a conversion where there is no terminal, what options mean, and tables."""

import re

import jax
import pytest

from dsjax.convert import options, tables
from dsjax.progress import ByteProgress, in_bytes


def test_lines_have_tensors_bytes_rate_and_time_left(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with ByteProgress(
        "import", tensors=10, num_bytes=9_000_000, done_tensors=2, done_bytes=1_000_000
    ) as bar:
        clock[0] += 4
        bar.advance(1_000_000, tensors=1)
        assert capsys.readouterr().out == ""
        clock[0] += 6
        bar.advance(1_000_000, tensors=1)
        # What was there before counts for nothing: two megabytes in ten seconds, six to go.
        told = "import  4/10 tensors  3.0 MB of 9.0 MB  200.0 kB/s  30 s left\n"
        assert capsys.readouterr().out == told
        bar.advance(6_000_000, tensors=6)
    last = "import  10/10 tensors  9.0 MB of 9.0 MB  800.0 kB/s  0 s left\n"
    assert capsys.readouterr().out == last


@pytest.mark.parametrize(
    ("number", "told"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (688_574_839_360, "688.6 GB")),
        *((1_029_170_000_000, "1.03 TB"), (5e15, "5000.00 TB")),
    ],
)
def test_bytes_are_told_in_powers_of_ten(number: float, told: str):
    assert in_bytes(number) == told


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5kB", 1500), ("2GiB", 2**31), ("77", 77)),
        *(("3TB", 3 * 10**12), ("1MiB", 2**20), ("12B", 12)),
    ],
)
def test_sizes(text: str, number: int):
    assert options.num_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "5GB5", "0", "0.1B", "1e9"])
def test_no_sizes(text: str):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        options.num_bytes(text)


def test_a_size_beyond_every_number_is_none():
    with pytest.raises(ValueError, match=r"'9{50}' is no size"):
        options.num_bytes("9" * 400)


def test_processes():
    assert options.process("0/1") == (0, 1) and options.process("3/8") == (3, 8)
    for text in ("1/1", "8/3", "0/0", "-1/2", "a/b", "1", "1/2/3", ""):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            options.process(text)


def test_jax_is_asked_and_let_go(monkeypatch: pytest.MonkeyPatch):
    """A process that held on would wait at its end for the others' shares, and be aborted."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append("initialize"))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(jax, "process_index", lambda: calls.append("index") or 2)
    monkeypatch.setattr(jax, "process_count", lambda: calls.append("count") or 4)
    assert options.process("jax") == (2, 4)
    assert calls == ["initialize", "index", "count", "shutdown"]

    def fail() -> None:
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match=r"DEADLINE_EXCEEDED.*--process i/n"):
        options.process("jax")


def test_a_table_without_a_terminal_is_columns(capsys: pytest.CaptureFixture):
    tables.show("weights", ("kind", "number"), [("embedding", "5"), ("head", "1,234")])
    told = ["weights", "  kind       number", "  embedding       5", "  head        1,234"]
    assert capsys.readouterr().out.splitlines() == told
