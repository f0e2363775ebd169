"""What a training script sees: open_data, the two parts, errors with their place."""

import dataclasses
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dsjax.data import bigram_bits_per_byte, open_data
from dsjax.data.documents import Unreadable
from dsjax.run import Files, StandardLibrary
from tests.data.corpus import TEXTS, write_jsonl, write_tokenizer

WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "x.jsonl", TEXTS)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return Files(path=str(tmp_path / "text"), tokenizer=str(tokenizer), held_out=0.25)


def documents_in(rows) -> set[int]:
    return {int(document) for row in rows for document in row.documents_T}


def test_the_two_parts_are_disjoint_and_complete(spec):
    data = open_data(spec, length=16, vocab_size=300)
    assert sorted([*data.train, *data.held_out]) == list(range(len(TEXTS)))
    rows = data.train_rows(seed=0)
    seen = documents_in(next(rows) for _ in range(200))
    assert seen == set(data.train.tolist())
    kept = documents_in(data.held_out_rows(10**6))
    assert kept and kept <= set(data.held_out.tolist())


def test_tokens_decode_to_the_document_they_say(spec):
    data = open_data(spec, length=4096, vocab_size=300)
    row = next(data.train_rows(seed=0))
    for segment in range(1, row.segments_T.max()):
        tokens = row.tokens_T[row.segments_T == segment]
        (document,) = set(row.documents_T[row.segments_T == segment].tolist())
        assert data.tokenizer.decode(tokens) == TEXTS[document]
        path, offset = data.locate(row.documents_T[row.segments_T == segment][0]).rsplit(":", 1)
        with open(path, "rb") as file:
            file.seek(int(offset))
            assert json.loads(file.readline())["text"] == TEXTS[document]


def test_held_out_rows_are_always_the_same_and_spread_over_the_part(spec):
    data = open_data(spec, length=8, vocab_size=300)
    everything = data.held_out_rows(10**6)
    again = open_data(spec, length=8, vocab_size=300).held_out_rows(4)
    picked = data.held_out_rows(4)
    assert len(picked) == len(again) == 4 and data.held_out_rows(0) == []
    places = []
    for one, other in zip(picked, again, strict=True):
        np.testing.assert_array_equal(one.tokens_T, other.tokens_T)
        np.testing.assert_array_equal(one.documents_T, other.documents_T)
        key = (int(one.documents_T[0]), int(one.offsets_T[0]))
        starts = [(int(row.documents_T[0]), int(row.offsets_T[0])) for row in everything]
        places.append(starts.index(key))
    assert places == [quarter * len(everything) // 4 for quarter in range(4)]


def test_a_held_out_part_below_one_row_gives_none(spec):
    data = open_data(dataclasses.replace(spec, held_out=0.0), length=16, vocab_size=300)
    assert data.held_out_rows(5) == []
    assert open_data(spec, length=100_000, vocab_size=300).held_out_rows(5) == []


def test_standard_library_rows():
    data = open_data(StandardLibrary(), length=512, vocab_size=258)
    row = next(data.train_rows(seed=1))
    assert row.tokens_T[0] == 256 and row.tokens_T.max() < 258 and row.segments_T.min() == 1
    path = data.locate(int(row.documents_T[0])).rsplit(":", 1)[0]
    with open(path, "rb") as file:
        begin = file.read(100)
    assert bytes(row.tokens_T[1:101].tolist()) == begin or len(begin) < 100
    # Python source is about 3.5 bits: 8 would be noise, and English letters alone give 4.1.
    assert 3.0 < data.bigram_bits_per_byte() < 4.0


def test_refuses_what_cannot_be_trained_on(spec):
    with pytest.raises(ValueError, match=r"vocab_size=299; it needs .* at least 300"):
        open_data(spec, length=16, vocab_size=299)
    with pytest.raises(ValueError, match="vocab_size of at least 258"):
        open_data(StandardLibrary(), length=16, vocab_size=257)
    with pytest.raises(ValueError, match=r"held_out=1\.0 is a share"):
        open_data(dataclasses.replace(spec, held_out=1.0), length=16, vocab_size=300)
    with pytest.raises(ValueError, match="all 40 documents are held out"):
        open_data(dataclasses.replace(spec, held_out=1 - 1e-12), length=16, vocab_size=300)
    with pytest.raises(ValueError, match="length=0"):
        open_data(spec, length=0, vocab_size=300)


def test_errors_while_reading_ahead_name_the_place(tmp_path, spec):
    (tmp_path / "text" / "x.jsonl").write_text('{"text": "good"}\n' * 3 + "bad\n")
    rows = open_data(dataclasses.replace(spec, held_out=0.0), length=16, vocab_size=300)
    with pytest.raises(ValueError, match=r"x\.jsonl:4 is not valid JSON"):
        list(zip(range(50), rows.train_rows(seed=0), strict=False))
    (tmp_path / "text" / "x.jsonl").unlink()
    (tmp_path / "text" / "latin.txt").write_bytes(b"caf\xe9")
    rows = open_data(dataclasses.replace(spec, held_out=0.0), length=16, vocab_size=300)
    with pytest.raises(ValueError, match=r"latin\.txt:0 is not UTF-8.*position 3"):
        next(rows.train_rows(seed=0))


def test_what_cannot_be_read_is_of_one_kind_with_its_place(tmp_path, spec):
    data = open_data(spec, length=8, vocab_size=300)
    (tmp_path / "text" / "x.jsonl").unlink()
    for read in (lambda: data.held_out_rows(4), data.bigram_bits_per_byte):
        with pytest.raises(Unreadable, match=r"No such file.*x\.jsonl"):
            read()
    table = pyarrow.table({"text": ["a", "b"] * 9})
    pyarrow.parquet.write_table(table, tmp_path / "text" / "p.parquet")
    data = open_data(dataclasses.replace(spec, held_out=0.0), length=8, vocab_size=300)
    # Shorter than its footer says: the library's message does not say which file.
    (tmp_path / "text" / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(Unreadable, match=r"p\.parquet"):
        data.bigram_bits_per_byte()


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"decoder": WORD_PIECE}, "WordPiece"), ({"token": "\u3042"}, "spelling of byte")],
)
def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused(tmp_path, spec, changes, told):
    file = write_tokenizer(tmp_path / "odd")
    definition = json.loads(file.read_text())
    if token := changes.pop("token", None):
        definition["model"]["vocab"][token] = max(definition["model"]["vocab"].values()) + 1
    file.write_text(json.dumps(definition | changes))
    with pytest.raises(ValueError, match=told):
        open_data(dataclasses.replace(spec, tokenizer=str(file)), length=16, vocab_size=400)


def test_streams_left_open_are_those_the_run_began_with(spec):
    data = open_data(spec, length=8, vocab_size=300)
    assert data.streams is None
    rows = data.train_rows(seed=0, streams=4)
    _ = [next(rows) for _ in range(7)]
    state = json.loads(json.dumps(rows.get_state()))
    expected = next(rows)
    resumed = data.train_rows(seed=0, streams=state["streams"])
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed).tokens_T, expected.tokens_T)
    with pytest.raises(ValueError, match="streams was 4, is 8"):
        data.train_rows(seed=0, streams=8).set_state(state)
    fixed = open_data(dataclasses.replace(spec, streams=3), length=8, vocab_size=300)
    assert fixed.train_rows(seed=0, streams=4).get_state()["streams"] == 3


def test_a_changed_folder_or_split_is_noticed_on_resume(tmp_path, spec):
    state = open_data(spec, length=16, vocab_size=300).train_rows(seed=0).get_state()
    open_data(spec, length=16, vocab_size=300).train_rows(seed=0).set_state(state)
    narrower = open_data(dataclasses.replace(spec, held_out=0.1), length=16, vocab_size=300)
    with pytest.raises(ValueError, match="source was"):
        narrower.train_rows(seed=0).set_state(state)
    write_jsonl(tmp_path / "text" / "y.jsonl", TEXTS[:1])
    with pytest.raises(ValueError, match="source was"):
        open_data(spec, length=16, vocab_size=300).train_rows(seed=0).set_state(state)
    other = write_tokenizer(tmp_path / "other", vocab_size=290)
    (tmp_path / "text" / "y.jsonl").unlink()
    changed = open_data(dataclasses.replace(spec, tokenizer=str(other)), length=16, vocab_size=300)
    with pytest.raises(ValueError, match="tokenizer was"):
        changed.train_rows(seed=0).set_state(state)


def test_bigram_entropy_against_counting_by_hand(spec):
    # "aab": pairs aa, ab -> one bit. A second document "ba" adds ba, certain given b: 2 bits / 3.
    assert bigram_bits_per_byte([b"aab"]) == 1.0
    assert abs(bigram_bits_per_byte([b"aab", b"", b"b", b"ba"]) - 2 / 3) < 1e-15
    assert bigram_bits_per_byte([b"abab", b"zz"], limit=4) == 0.0
    assert bigram_bits_per_byte([b"aabzzz"], limit=3) == 1.0
    with pytest.raises(ValueError, match="no two neighbouring bytes"):
        bigram_bits_per_byte([b"a", b""])
    data = open_data(spec, length=16, vocab_size=300)
    pairs: dict[int, dict[int, int]] = {}
    for number in data.train:
        raw = TEXTS[number].encode()
        for one, two in itertools.pairwise(raw):
            row = pairs.setdefault(one, {})
            row[two] = row.get(two, 0) + 1
    total = sum(sum(row.values()) for row in pairs.values())
    bits = -sum(
        count * np.log2(count / sum(row.values()))
        for row in pairs.values()
        for count in row.values()
    )
    # Some 200 float64 terms, each rounded at 1e-16.
    assert abs(data.bigram_bits_per_byte() - bits / total) < 1e-13
