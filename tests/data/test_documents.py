"""Sources of documents: what they read, where they point, what they refuse, how they split."""

import hashlib
import json
import sys
import sysconfig

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dsjax.data import files
from dsjax.data.documents import Documents, folder_documents, standard_library_documents
from tests.data.corpus import TEXTS, write_jsonl


def texts_of(documents: Documents) -> list[str]:
    return [documents.read(number).decode() for number in range(len(documents))]


def test_reads_all_formats_recursively_in_path_order(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("all\nof it", encoding="utf-8")
    write_jsonl(tmp_path / "b" / "deep" / "x.JSONL", TEXTS[:5])
    table = pyarrow.table({"other": [1, 2, 3, 4], "text": ["p0", "", "p2 é", "p3"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=3)
    (tmp_path / "notes.md").write_text("ignored")
    documents = folder_documents(str(tmp_path), "text")
    assert texts_of(documents) == ["all\nof it", *TEXTS[:5], "p0", "", "p2 é", "p3"]
    assert documents.locate(0) == f"{tmp_path}/a.txt:0"
    assert documents.locate(9) == f"{tmp_path}/c.parquet:row 3"


@pytest.mark.parametrize("scan_bytes", [1, 7, 1 << 24])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_jsonl_lines_and_offsets(tmp_path, monkeypatch, scan_bytes, end, newline):
    monkeypatch.setattr(files, "SCAN_BYTES", scan_bytes)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS[:4]]
    raw = newline.join([*lines[:2], "", *lines[2:]]) + end.replace("\n", newline)
    (tmp_path / "x.jsonl").write_bytes(raw.encode())
    documents = folder_documents(str(tmp_path), "text")
    assert texts_of(documents) == TEXTS[:4]
    for number, line in enumerate(lines):
        offset = int(documents.locate(number).rsplit(":", 1)[1])
        assert raw.encode()[offset:].startswith(line.encode())


def test_an_empty_file_holds_no_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.txt").write_text("text")
    assert texts_of(folder_documents(str(tmp_path), "text")) == ["text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', r"x\.jsonl:3 is not valid JSON"),
        (b'{"body": "a", "id": 1}', r"x\.jsonl:3 has no field 'text'.*\['body', 'id'\]"),
        (b'["text"]', r"x\.jsonl:3 holds a JSON list"),
        (b'{"text": 5}', r"x\.jsonl:3: field 'text' is int"),
        (b'{"text": null}', r"x\.jsonl:3: field 'text' is NoneType"),
        (b'{"text": "\xff"}', r"x\.jsonl:3 is not UTF-8"),
        (b'{"text": "\\ud800"}', r"x\.jsonl:3: 'text' holds half a surrogate pair"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, message):
    good = b'{"text": "good"}'
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, b"", line, good]))
    documents = folder_documents(str(tmp_path), "text")
    assert documents.read(0) == documents.read(2) == b"good"
    with pytest.raises(ValueError, match=message):
        documents.read(1)


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    write = pyarrow.parquet.write_table
    write(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are \['body', 'id'\]"):
        folder_documents(str(tmp_path), "text")
    with pytest.raises(ValueError, match=r"column 'id' is of type int64"):
        folder_documents(str(tmp_path), "id")
    write(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"x\.parquet:row 1: column 'text' is null"):
        folder_documents(str(tmp_path), "text").read(1)
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read as Parquet"):
        folder_documents(str(tmp_path), "text")


def test_missing_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"x\.parquet .*pip install pyarrow"):
        folder_documents(str(tmp_path), "text")


def test_refuses_a_folder_without_documents(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        folder_documents(str(tmp_path / "none"), "text")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        folder_documents(str(tmp_path / "README.md"), "text")
    with pytest.raises(ValueError, match="holds no"):
        folder_documents(str(tmp_path), "text")


def test_refuses_numbers_of_no_document(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", TEXTS[:3])
    documents = folder_documents(str(tmp_path), "text")
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"no document {number}; .* from 0 to 2"):
            documents.locate(number)


def test_split_keeps_its_share_and_survives_new_files(tmp_path):
    write_jsonl(tmp_path / "m.jsonl", ["x"] * 10_000)
    before = folder_documents(str(tmp_path), "text").held_out(0.05)
    # Binomial(10000, 0.05): standard deviation 22, so 6 of them allow for any honest hash.
    assert abs(before.sum() - 500) < 130
    assert abs(before[:5000].sum() - 250) < 95
    write_jsonl(tmp_path / "a.jsonl", ["y"] * 10_000)
    after = folder_documents(str(tmp_path), "text").held_out(0.05)
    np.testing.assert_array_equal(after[10_000:], before)
    assert (after[:10_000] != before).any()
    wider = folder_documents(str(tmp_path), "text").held_out(0.2)
    assert wider[after].all() and wider.sum() > after.sum()
    assert not folder_documents(str(tmp_path), "text").held_out(0.0).any()


def test_split_is_the_one_pinned_here(tmp_path):
    # SplitMix64 with plain Python integers, seeded by sha256("m.jsonl").
    seed, mask = int(hashlib.sha256(b"m.jsonl").hexdigest()[:16], 16), 2**64 - 1
    expected = []
    for index in range(1, 201):
        z = (seed + index * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append((z ^ (z >> 31)) / 2**64 < 0.1)
    write_jsonl(tmp_path / "m.jsonl", ["x"] * 200)
    assert folder_documents(str(tmp_path), "text").held_out(0.1).tolist() == expected


def test_fingerprint_sees_added_grown_and_renamed_files(tmp_path):
    def fingerprint():
        return folder_documents(str(tmp_path), "text").fingerprint()

    write_jsonl(tmp_path / "m.jsonl", TEXTS[:3])
    prints = [fingerprint(), fingerprint()]
    assert prints[0] == prints[1]
    write_jsonl(tmp_path / "m.jsonl", [*TEXTS[:2], TEXTS[2] + "!"])
    prints.append(fingerprint())
    (tmp_path / "m.jsonl").rename(tmp_path / "n.jsonl")
    prints.append(fingerprint())
    (tmp_path / "o.txt").write_text("")
    prints.append(fingerprint())
    assert len(set(prints)) == 4


def test_standard_library_is_there_and_is_only_the_library():
    documents = standard_library_documents()
    places = [documents.locate(number) for number in range(len(documents))]
    assert any(place.endswith("/argparse.py:0") for place in places)
    inside = [place.removeprefix(sysconfig.get_path("stdlib")) for place in places]
    for excluded in ("/site-packages/", "/test/", "/tests/", "/idle_test/", "/__pycache__/"):
        assert not [place for place in inside if excluded in place]
    held_out = documents.held_out(0.05)
    sizes = np.array([len(documents.read(number)) for number in range(len(documents))])
    assert sizes[~held_out].sum() > 5_000_000
    assert 0.01 < held_out.mean() < 0.15
