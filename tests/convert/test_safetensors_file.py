"""Headers of which nothing is believed, and slices that are read from where they lie."""

import itertools
import json
import tracemalloc
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dsjax.hf.fused import unfused
from dsjax.hf.safetensors_file import DTYPES, KINDS, Stored, read_header

TENSORS = {
    "cube": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
    "flat": np.arange(7).astype(ml_dtypes.bfloat16),
    "fp8": np.arange(6, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 3),
    "nothing": np.zeros((0, 3), np.float16),
    "one": np.array(5.0),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_what_safetensors_wrote_is_read(file: Path):
    header = read_header(file)
    assert header.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        stored = Stored(file, name, header[name])
        assert (stored.shape, stored.dtype) == (tensor.shape, tensor.dtype)
        read = stored[(slice(None),) * tensor.ndim]
        assert read.dtype == tensor.dtype and read.tobytes() == tensor.tobytes()


def test_every_slice_of_a_cube(file: Path):
    stored = Stored(file, "cube", read_header(file)["cube"])
    ranges = [
        [slice(start, stop) for start in range(n + 1) for stop in range(start, n + 1)]
        for n in stored.shape
    ]
    for index in itertools.product(*ranges):
        np.testing.assert_array_equal(stored[index], TENSORS["cube"][index])


def test_a_slice_reads_its_bytes_and_no_more(file: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    read, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
    stored = Stored(file, "cube", read_header(file)["cube"])
    stored[slice(1, 3), slice(None), slice(None)]
    assert read == [2 * 4 * 5 * 4]
    read.clear()
    stored[slice(2, 3), slice(1, 3), slice(0, 5)]
    assert read == [2 * 5 * 4]
    read.clear()
    stored[slice(0, 3), slice(0, 1), slice(2, 4)]
    assert read == [2 * 4] * 3


def test_every_type_of_the_format_that_numpy_knows(tmp_path: Path):
    file = tmp_path / "all.safetensors"
    tensors = {kind: np.zeros(3, dtype) for kind, dtype in DTYPES.items() if kind != "C64"}
    save_file(tensors, file)
    assert {name: entry.dtype for name, entry in read_header(file).items()} == {
        kind: tensor.dtype for kind, tensor in tensors.items()
    }
    assert all(KINDS[dtype] == kind for kind, dtype in DTYPES.items())


def test_a_file_cut_short_after_its_header_was_read(file: Path):
    stored = Stored(file, "cube", read_header(file)["cube"])
    file.write_bytes(file.read_bytes()[: stored.entry.start + 10])
    with pytest.raises(ValueError, match="the file ends inside cube, at byte"):
        stored[(slice(None),) * 3]


def written(path: Path, header: bytes, values: bytes = b"", length: int | None = None) -> Path:
    number = len(header) if length is None else length
    path.write_bytes(number.to_bytes(8, "little") + header + values)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# What is wrong, and what has to be told of it. The values are 16 bytes: of "a" and of "b".
HEADERS = {
    "overlap": (
        {"a": GOOD, "b": GOOD | {"shape": [3], "data_offsets": [4, 16]}},
        r"b begins at byte \d+, expected \d+; it overlaps a",
    ),
    "hole": (
        {"a": GOOD, "b": GOOD | {"shape": [1], "data_offsets": [12, 16]}},
        "it leaves a hole behind a",
    ),
    "hole in front": ({"a": GOOD | {"data_offsets": [8, 16]}}, "behind the header"),
    "out of range": (
        {"a": GOOD, "b": GOOD | {"data_offsets": [9, 17]}},
        "b: its values end at byte .* of a file of",
    ),
    "bytes behind": ({"a": GOOD}, "expected .*, where a ends"),
    "no tensor": ({}, "where the header ends"),
    "shape against offsets": (
        {"a": GOOD | {"shape": [3]}},
        r"a: F32 \[3\] takes 12 bytes, data_offsets hold 8",
    ),
    "backwards": ({"a": GOOD | {"data_offsets": [8, 0]}}, r"a: data_offsets are \[8, 0\]"),
    "one offset": ({"a": GOOD | {"data_offsets": [0]}}, r"a: data_offsets are \[0\]"),
    "negative offset": ({"a": GOOD | {"data_offsets": [-8, 0]}}, r"data_offsets are \[-8, 0\]"),
    "fractional offset": ({"a": GOOD | {"data_offsets": [0, 8.0]}}, r"are \[0, 8.0\]"),
    "true is no number": ({"a": GOOD | {"shape": [True, 2]}}, r"a: shape is \[True, 2\]"),
    "negative shape": ({"a": GOOD | {"shape": [-1, -2]}}, r"a: shape is \[-1, -2\]"),
    "huge shape": ({"a": GOOD | {"shape": [2**80]}}, "a: shape is"),
    "many dimensions": ({"a": GOOD | {"shape": [1] * 9}}, "expected at most 8 whole numbers"),
    "shape is no list": ({"a": GOOD | {"shape": "2"}}, "a: shape is '2'"),
    "unknown type": ({"a": GOOD | {"dtype": "F4"}}, "a: dtype is 'F4', expected one of BF16"),
    "type is no word": ({"a": GOOD | {"dtype": ["F32"]}}, "a: dtype is"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, "found .'dtype', 'shape'"),
    "unknown field": ({"a": GOOD | {"stride": [1]}}, "expected the fields data_offsets, dtype"),
    "no fields": ({"a": 5}, "a: expected the fields .* found int"),
    "metadata": ({"__metadata__": {"format": 1}, "a": GOOD}, "its __metadata__ is no object"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_describes_no_file(case: str, tmp_path: Path):
    header, told = HEADERS[case]
    path = written(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes(16))
    with pytest.raises(ValueError, match=f"m.safetensors is damaged.*{told}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "a header of 0 bytes does not fit into 0 bytes"),
        (b"\x05\0\0\0", "does not fit into 4 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "a header of 1000 bytes does not fit into 10"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "does not fit into 10 bytes"),
        ((2).to_bytes(8, "little") + b"[]", r"it begins with b'\['"),
        ((3).to_bytes(8, "little") + b" {}", "it begins with b' '"),
        ((0).to_bytes(8, "little"), "it begins with b''"),
        ((4).to_bytes(8, "little") + b'{"a"', "its header cannot be read"),
        ((4).to_bytes(8, "little") + b'{"\xff"', "its header cannot be read"),
        ((18).to_bytes(8, "little") + b'{"a":NaN,"b":null}', "NaN is no JSON"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "'a' stands twice"),
        ((200_005).to_bytes(8, "little") + b'{"a":' + b"[" * 200_000, "cannot be read"),
    ],
)
def test_bytes_that_are_no_header(content: bytes, told: str, tmp_path: Path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"m.safetensors is damaged.*{told}"):
        read_header(path)


def test_a_header_too_long_is_not_even_read(tmp_path: Path):
    """200 MB of header on a disk that stores holes for free."""
    path = written(tmp_path / "m.safetensors", b"{}", length=200_000_000)
    with path.open("r+b") as file:
        file.truncate(300_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="its header has 200000000 bytes, more than 100000000"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_no_such_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"m.safetensors is damaged.*No such file"):
        read_header(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="Is a directory"):
        read_header(tmp_path)


tilings = st.lists(
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)), max_size=3
)
odd = st.sampled_from([None, True, -1, 2**70, 1.5, "F32", "", [], [1], [-1, 1], [0, 8], {}])
changes = st.tuples(st.integers(0, 2**12), st.sampled_from(["set", "cut", "add"]), st.binary())


def tiled(parts: list) -> tuple[dict, int]:
    """A header of tensors one behind the other, and how many bytes they take."""
    header, stop = {}, 0
    for i, (kind, shape) in enumerate(parts):
        start, stop = stop, stop + int(np.prod(shape, dtype=int)) * DTYPES[kind].itemsize
        header[f"t{i}"] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
    return header, stop


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Files of the format, or nearly: with a field, the length or a few bytes changed."""
    header, size = tiled(draw(tilings))
    what = draw(st.sampled_from(["good", "field", "entry", "length", "bytes", "size"]))
    if what == "field" and header:
        header["t0"][draw(st.sampled_from(list(header["t0"])))] = draw(odd)
    if what == "entry":
        header[draw(st.sampled_from(["t0", "t1", "__metadata__"]))] = draw(odd)
    text = json.dumps(header).encode()
    number = len(text) + (draw(st.sampled_from([1, -1, 2**40])) if what == "length" else 0)
    size += draw(st.integers(-3, 3)) if what == "size" else 0
    content = number.to_bytes(8, "little") + text + bytes(max(size, 0))
    if what == "bytes":
        place, how, new = draw(changes)
        place %= len(content)
        behind = {"cut": b"", "add": content[place:], "set": content[place + len(new) :]}[how]
        content = content[:place] + new + behind
    return content


def test_any_file_is_read_or_refused(tmp_path: Path):
    """Whatever is accepted, the format's own library accepts too, and finds the same in it."""
    path, outcomes = tmp_path / "fuzzed.safetensors", []

    @hypothesis.settings(max_examples=1200)
    @hypothesis.given(files())
    def try_one(content: bytes) -> None:
        path.unlink(missing_ok=True)  # a file system may want to save one that is overwritten
        path.write_bytes(content)
        try:
            header = read_header(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is damaged") and len(str(error)) < 1000
            outcomes.append("refused")
            return
        outcomes.append("accepted")
        with safetensors.safe_open(path, framework="numpy") as theirs:
            assert header.keys() == set(theirs.keys())
            for name, entry in header.items():
                slice_ = theirs.get_slice(name)
                assert (slice_.get_dtype(), tuple(slice_.get_shape())) == (entry.kind, entry.shape)
                read = Stored(path, name, entry)[(slice(None),) * len(entry.shape)]
                assert read.tobytes() == content[entry.start : entry.stop]

    try_one()
    assert len(outcomes) >= 1200 and min(map(outcomes.count, ("accepted", "refused"))) > 200


def test_fused_experts_are_seen_one_by_one(tmp_path: Path):
    rng = np.random.default_rng(0)
    prefix = "model.layers.3.mlp.experts"
    gate_up, down = rng.normal(size=(3, 8, 5)), rng.normal(size=(3, 5, 4))
    scales = rng.normal(size=(3, 2, 1))
    fused = {
        f"{prefix}.gate_up_proj": gate_up,
        f"{prefix}.down_proj": down,
        f"{prefix}.gate_up_proj_scale_inv": scales,
        "model.norm.weight": np.ones(5),
    }
    save_file(fused, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    seen = unfused({n: Stored(tmp_path / "m.safetensors", n, e) for n, e in header.items()})
    assert len(seen) == 3 * (3 + 2) + 1
    for expert in range(3):
        for name, whole in (
            ("gate_proj.weight", gate_up[expert, :4]),
            ("up_proj.weight", gate_up[expert, 4:]),
            ("down_proj.weight", down[expert]),
            ("up_proj.weight_scale_inv", scales[expert, 1:]),
        ):
            part = seen[f"{prefix}.{expert}.{name}"]
            assert part.shape == whole.shape
            np.testing.assert_array_equal(part[slice(None), slice(None)], whole)
            np.testing.assert_array_equal(part[slice(1, 3), slice(2, 4)], whole[1:3, 2:4])


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("gate_up_proj", (2, 5, 4), r"gate_up_proj is \(2, 5, 4\), expected .* multiple of 2 rows"),
        ("down_proj", (2, 5), r"down_proj is \(2, 5\), expected \[experts, rows, columns\]"),
        ("down_proj", (1, 5, 4), "both by itself and fused"),
    ],
)
def test_fused_experts_that_cannot_be_divided(name: str, shape: tuple, told: str):
    prefix = "model.layers.3.mlp.experts"
    with pytest.raises(ValueError, match=told):
        unfused(
            {f"{prefix}.{name}": np.zeros(shape), f"{prefix}.0.down_proj.weight": np.zeros((5, 4))}
        )
