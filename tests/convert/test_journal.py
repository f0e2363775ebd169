"""The record of a conversion: what survives, whose it is, and what it refuses."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from dsjax.convert.journal import Journal, begun, check, fingerprint, replace_bytes

PLAN = {"command": "cast", "dtype": "bf16", "source": {"a.safetensors": 3}}


def test_what_was_recorded_is_there_for_the_next(tmp_path: Path):
    with Journal(tmp_path / "new", PLAN) as journal:
        assert journal.done == {}
        journal.record("a", crc32=5)
        journal.record("b")
    with Journal(tmp_path / "new", PLAN) as journal:
        assert journal.done == {"a": {"crc32": 5}, "b": {}}


def test_lines_of_all_processes_count(tmp_path: Path):
    with Journal(tmp_path, PLAN, (0, 2)) as first, Journal(tmp_path, PLAN, (1, 2)) as second:
        first.record("a")
        second.record("b")
        assert first.done.keys() == {"a"}
        first.refresh()
        assert first.done.keys() == {"a", "b"}
    # Another number of processes may take over once these are gone.
    with Journal(tmp_path, PLAN) as alone:
        assert alone.done.keys() == {"a", "b"}


def test_a_torn_line_counts_for_nothing_and_is_overwritten(tmp_path: Path):
    with Journal(tmp_path, PLAN) as journal:
        journal.record("a")
        journal.record("b")
    file = tmp_path / ".conversion" / "0-of-1.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    with Journal(tmp_path, PLAN, (0, 1)) as journal:
        assert journal.done.keys() == {"a"}
        journal.record("c")
    assert [json.loads(line)["unit"] for line in file.read_text().splitlines()] == ["a", "c"]


def test_what_a_killed_process_left_is_removed_by_who_works_alone(tmp_path: Path):
    left = tmp_path / ".conversion" / "zarr.json.1234abcd.partial"
    Journal(tmp_path, PLAN).close()
    left.touch()
    # It may be another one's that is at work right now.
    Journal(tmp_path, PLAN, (0, 2)).close()
    assert left.exists()
    Journal(tmp_path, PLAN).close()
    assert not left.exists()


def test_a_process_is_at_work_once(tmp_path: Path):
    with Journal(tmp_path, PLAN, (0, 2)):
        with pytest.raises(ValueError, match="process 0/2 is already at work"):
            Journal(tmp_path, PLAN, (0, 2))
        with pytest.raises(ValueError, match=r"process 0/2 is still at work .* 3 processes"):
            Journal(tmp_path, PLAN, (1, 3))
        Journal(tmp_path, PLAN, (1, 2)).close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "fp8"}, "dtype was 'bf16', is 'fp8'"),
        ({"source": {"a.safetensors": 4}}, "source a.safetensors was 3, is 4"),
        ({"source": {}}, "source a.safetensors was 3, is None"),
        ({"layers": [0, 4]}, r"layers was None, is \[0, 4\]"),
    ],
)
def test_another_plan_is_refused(tmp_path: Path, change: dict, told: str):
    with Journal(tmp_path, PLAN) as journal:
        journal.record("a")
    with pytest.raises(ValueError, match=f"holds another conversion: {told}; repeat"):
        Journal(tmp_path, PLAN | change)
    check(tmp_path, PLAN)


def test_a_directory_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    for refuse in (check, Journal):
        with pytest.raises(ValueError, match=r"not empty \(it holds thesis.tex\)"):
            refuse(tmp_path, PLAN)
    with pytest.raises(ValueError, match="is a file"):
        check(tmp_path / "thesis.tex", PLAN)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="link is a link to nowhere"):
        check(tmp_path / "link", PLAN)
    (tmp_path / "link").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_check_writes_nothing(tmp_path: Path):
    check(tmp_path / "new", PLAN)
    assert not (tmp_path / "new").exists() and not begun(tmp_path / "new")


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b'{"crc32": 1}\n', b'{"uni{"unit": "b"}\n', b"\0\0\xff\n"]
)
def test_a_line_that_is_no_record_costs_its_unit_alone(tmp_path: Path, line: bytes):
    with Journal(tmp_path, PLAN) as journal:
        journal.record("a")
    with (tmp_path / ".conversion" / "0-of-1.jsonl").open("ab") as file:
        file.write(line)
    with Journal(tmp_path, PLAN) as journal:
        assert journal.done.keys() == {"a"}
        journal.record("c")
        assert journal.done.keys() == {"a", "c"}


def test_of_two_that_begin_at_once_the_first_plan_stands(tmp_path: Path):
    """The second one comes between the first one's look and its writing."""
    (tmp_path / ".conversion").mkdir()
    told: list[str] = []

    def begin() -> None:
        try:
            Journal(tmp_path, PLAN | {"dtype": "fp8"}).close()
        except ValueError as error:
            told.append(str(error))

    second = threading.Thread(target=begin)
    with (tmp_path / ".conversion" / "plan.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second.start()
        second.join(0.2)
        replace_bytes(tmp_path / ".conversion" / "plan.json", json.dumps(PLAN).encode())
    second.join()
    assert len(told) == 1 and "dtype was 'bf16', is 'fp8'" in told[0]
    Journal(tmp_path, PLAN).close()


def test_a_line_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Journal(tmp_path, PLAN) as journal:
        journal.record("a")
        real = os.write
        monkeypatch.setattr(os, "write", lambda file, line: real(file, line[:7]))
        with pytest.raises(OSError, match="No space left") as caught:
            journal.record("b")
        monkeypatch.undo()
        assert caught.value.errno == errno.ENOSPC
    with Journal(tmp_path, PLAN) as journal:
        assert journal.done.keys() == {"a"}


def test_a_small_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace_bytes(tmp_path / "config.json", b"one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_bytes(tmp_path / "config.json", b"two")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"config.json": b"one"}


def test_a_source_is_known_by_its_weights_files_and_by_what_its_json_says(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"123")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.json").mkdir()
    before = fingerprint(tmp_path)
    assert before.keys() == {"model.safetensors", "config.json"}
    assert before["model.safetensors"]["size"] == 3
    (tmp_path / "config.json").write_text("[]")
    after = fingerprint(tmp_path)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after["config.json"] != before["config.json"]


@pytest.mark.parametrize("file", ["model.safetensors", "weights/x.safetensors"])
def test_other_weights_of_the_same_size_are_another_source(file: str, tmp_path: Path):
    index = {"weight_map": {"lm_head.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"123")
    os.utime(tmp_path / file, ns=(0, 10**18))
    before = fingerprint(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(b"456")
    with Journal(tmp_path / "DST", PLAN | {"source": before}):
        pass
    with pytest.raises(ValueError, match=f"source {file} mtime_ns was {10**18}, is"):
        check(tmp_path / "DST", PLAN | {"source": fingerprint(tmp_path)})
