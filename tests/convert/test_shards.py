"""The writer of shards: files that others read, kills, full disks, several processes."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dsjax.convert import shards
from dsjax.convert.journal import Journal
from tests.convert import published

ROOT = Path(__file__).parents[2]
PLAN = {"command": "test"}
RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray] = {
    "odd": RNG.integers(0, 256, (3, 7), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    "scale": RNG.normal(size=(1, 1)).astype(np.float32),
    "big": RNG.normal(size=(300, 50)).astype(np.float32),
    "norm": RNG.normal(size=9).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.0, np.float32),
    "last": RNG.normal(size=(50, 40)).astype(ml_dtypes.bfloat16),
}


def write(
    target: Path, *, size: int = 10_000, process: tuple[int, int] = (0, 1), tensors: dict = TENSORS
) -> bool:
    planned = shards.plan(tensors, size)
    with Journal(target, PLAN, process) as journal:
        whole = shards.write(planned, tensors, journal, what="test")
    if whole:
        shards.finish(target, planned, {"model_type": "test"}, {})
    return whole


def test_what_is_written_is_read_by_others(tmp_path: Path):
    assert write(tmp_path / "DST")
    published.same(published.read(tmp_path / "DST"), TENSORS)
    index = json.loads((tmp_path / "DST" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    for name, file in index["weight_map"].items():
        path = tmp_path / "DST" / file
        with safetensors.safe_open(path, framework="numpy") as theirs:
            assert name in theirs.keys() and theirs.metadata() == {"format": "pt"}  # noqa: SIM118
    names = sorted(path.name for path in (tmp_path / "DST").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_every_tensor_begins_where_its_type_may(tmp_path: Path):
    """An FP8 tensor of odd length comes behind those that its length would push off."""
    (one,) = shards.plan(TENSORS, 10**9)
    assert one.name == "model.safetensors" and len(one.header) % 8 == 0
    for name, entry in one.entries.items():
        assert (entry.start - len(one.header)) % TENSORS[name].dtype.itemsize == 0


def test_files_are_filled_up_to_their_size():
    sizes = {name: t.nbytes for name, t in TENSORS.items()}
    planned = shards.plan(TENSORS, 10_000)
    contents = [list(shard.entries) for shard in planned]
    assert [name for names in contents for name in names] == list(TENSORS)
    for names, following in itertools.pairwise(contents):
        total = sum(sizes[name] for name in names)
        assert total <= 10_000 or len(names) == 1
        assert total + sizes[following[0]] > 10_000


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "PIECE", 64 * 50 * 4)
    read = []

    class Lazy:
        shape, dtype = TENSORS["big"].shape, TENSORS["big"].dtype

        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            read.append(index[0].stop - index[0].start)
            return TENSORS["big"][index]

    assert write(tmp_path / "DST", tensors=TENSORS | {"big": Lazy()})
    assert read == [128, 128, 44]
    published.same(published.read(tmp_path / "DST"), TENSORS)


def test_processes_share_the_work_and_the_result_is_the_same(tmp_path: Path):
    write(tmp_path / "one", size=2000)
    assert not write(tmp_path / "two", size=2000, process=(1, 2))
    assert not (tmp_path / "two" / "config.json").exists()
    assert write(tmp_path / "two", size=2000, process=(0, 2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    done = []
    threads = [
        threading.Thread(
            target=lambda i=i: done.append(write(tmp_path / "three", size=2000, process=(i, 3)))
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(done) and contents(tmp_path / "one") == contents(tmp_path / "three")


def test_the_marker_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever moment it is stopped at: with config.json, everything else is there."""
    (tmp_path / "tokenizer.json").write_text("{}")
    seen, real = [], os.replace

    def replace(unfinished: Path, path: Path) -> None:
        real(unfinished, path)
        seen.append(path.name)

    planned = shards.plan(TENSORS, 10_000)
    monkeypatch.setattr(os, "replace", replace)
    with Journal(tmp_path / "DST", PLAN) as journal:
        assert shards.write(planned, TENSORS, journal, what="test")
    small = {"tokenizer.json": tmp_path / "tokenizer.json"}
    shards.finish(tmp_path / "DST", planned, {}, small)
    index = "model.safetensors.index.json"
    assert seen[0] == "plan.json" and seen[-3:] == ["tokenizer.json", index, "config.json"]
    assert sorted(seen) == sorted({"plan.json", *contents(tmp_path / "DST")})


def test_small_files_are_passed_and_weights_are_not(tmp_path: Path):
    passed = (
        "tokenizer.json",
        "generation_config.json",
        "LICENSE",
        "tiktoken.model",
        "modeling.py",
    )
    left = ("config.json", "model.safetensors", "model.safetensors.index.json", "weights.bin")
    for name in (*passed, *left, ".gitattributes"):
        (tmp_path / name).touch()
    (tmp_path / "figures").mkdir()
    assert shards.small_files(tmp_path) == {name: tmp_path / name for name in sorted(passed)}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_shares_are_whole_and_even():
    planned = shards.plan({f"t{i}": np.zeros(1000 + i, np.float32) for i in range(50)}, 5000)
    parts = [shards.share(planned, (i, 4)) for i in range(4)]
    assert sorted(s.name for part in parts for s in part) == [s.name for s in planned]
    loads = [sum(shard.size for shard in part) for part in parts]
    assert max(loads) - min(loads) <= max(shard.size for shard in planned)


def test_a_full_disk_is_told_and_the_rest_can_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As from the kernel: a write that takes a part, then one that takes nothing."""
    room, real, lock = [9_000], os.pwrite, threading.Lock()

    def pwrite(file: int, content: memoryview, offset: int) -> int:
        with lock:
            if not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real(file, content[: room[0]], offset)
            room[0] -= count
            return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left on device; what is finished stays") as caught:
        write(tmp_path / "DST")
    assert caught.value.errno == errno.ENOSPC and ".safetensors.partial" in caught.value.filename
    assert not (tmp_path / "DST" / "config.json").exists()
    monkeypatch.undo()
    with Journal(tmp_path / "DST", PLAN) as journal:
        kept = set(journal.done)
    assert kept and kept < TENSORS.keys()
    assert write(tmp_path / "DST")
    published.same(published.read(tmp_path / "DST"), TENSORS)
    assert not list((tmp_path / "DST").glob("*.partial"))


def test_a_disk_too_small_is_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"has 50.0 kB free, 64.6 kB are still to be written"):
        shards.check_space(tmp_path / "DST", shards.plan(TENSORS, 10_000))
    assert not (tmp_path / "DST").exists()


def test_a_damaged_tensor_of_an_unfinished_shard_is_done_again(tmp_path: Path):
    """Recorded is not enough: the values are read back and compared with their CRC-32."""
    target, (shard,) = tmp_path / "DST", shards.plan(TENSORS, 10**9)
    write(target, size=10**9)
    (target / "config.json").unlink()
    partial = target / "model.safetensors.partial"
    (target / "model.safetensors").rename(partial)
    with partial.open("r+b") as file:
        file.seek(shard.entries["big"].start + 5)
        file.write(b"\xff\xff\xff")
    read = []

    class Watched:
        def __init__(self, name: str):
            self.name, self.shape = name, TENSORS[name].shape
            self.dtype = TENSORS[name].dtype

        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            read.append(self.name)
            return TENSORS[self.name][index]

    assert write(target, size=10**9, tensors={name: Watched(name) for name in TENSORS})
    assert set(read) == {"big"}
    published.same(published.read(target), TENSORS)


KILLED = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    import numpy as np
    from dsjax.convert import shards
    from dsjax.convert.journal import Journal

    class Slow:
        shape, dtype = (40, 100), np.dtype(np.float32)
        def __init__(self, seed):
            self.seed = seed
        def __getitem__(self, index):
            time.sleep(0.002)
            return np.random.default_rng(self.seed).normal(size=self.shape).astype("f4")[index]

    tensors = {f"t{i}": Slow(i) for i in range(300)}
    target = Path(sys.argv[1])
    planned = shards.plan(tensors, 300_000)
    with Journal(target, {"command": "test"}) as journal:
        print(len(journal.done), flush=True)
        if shards.write(planned, tensors, journal, what="test"):
            shards.finish(target, planned, {}, {})
""")


def run_killed(target: Path, more: int | None, delay: float) -> None:
    """Runs the writer; kills it when it has recorded `more` further tensors and a little later."""
    journal = target / ".conversion" / "0-of-1.jsonl"
    before = journal.read_bytes().count(b"\n") if journal.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)], cwd=ROOT, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    if more is not None:
        while process.poll() is None and journal.read_bytes().count(b"\n") < before + more:
            threading.Event().wait(0.001)
        threading.Event().wait(delay)
        process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_ten_times_it_ends_with_the_same_bytes(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    run_killed(tmp_path / "whole", None, 0.0)
    target = tmp_path / "killed"
    for _ in range(10):
        run_killed(target, int(rng.integers(1, 25)), float(rng.uniform(0, 0.01)))
        assert not (target / "config.json").exists()
    run_killed(target, None, 0.0)
    assert contents(target) == contents(tmp_path / "whole")
    lines = (target / ".conversion" / "0-of-1.jsonl").read_text().splitlines()
    units = [json.loads(line)["unit"] for line in lines]
    # No finished tensor was done again: a kill -9 takes nothing from the operating system.
    assert len(units) == len(set(units)) == 300
