"""Packing, order and resumption of rows, against a packer written out by hand."""

import itertools
import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest

from dsjax.data import Bytes, RowIterator, merged
from dsjax.data.documents import Documents
from dsjax.data.files import WholeFile
from dsjax.data.rows import rows_once

# Lengths in bytes around the row length (8): empty, one byte, exact fits with begin and end, and
# one document over several rows.
LENGTHS = [0, 1, 6, 7, 13, 14, 30, 3, 2, 22, 5]
FIELDS = ["tokens_T", "segments_T", "positions_T", "documents_T", "offsets_T"]


@pytest.fixture
def documents(tmp_path):
    files = []
    for number, size in enumerate(LENGTHS):
        path = tmp_path / f"{number:02}.txt"
        path.write_bytes(bytes((number * 17 + place) % 256 for place in range(size)))
        files.append(WholeFile(path, path.name))
    return Documents(files)


def rows_of(documents, *, length=8, seed=3, source="s", streams=1):
    return RowIterator(
        documents,
        np.arange(len(documents)),
        Bytes(),
        length=length,
        seed=seed,
        source=source,
        streams=streams,
    )


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def document_order(rows) -> list[int]:
    """Documents in the order they begin in the stream."""
    return [
        int(document)
        for row in rows
        for document, offset in zip(row.documents_T, row.offsets_T, strict=True)
        if offset == 0
    ]


def packed_by_hand(documents, order, length):
    """One token after the other, no packer: (token, segment, position, document, offset)."""
    stream = [
        (token, document, offset)
        for document in order
        for offset, token in enumerate([256, *documents.read(document), 257])
    ]
    for start in range(0, len(stream) - length + 1, length):
        segment, position, row = 0, 0, []
        for place, (token, document, offset) in enumerate(stream[start : start + length]):
            fresh = place == 0 or offset == 0
            segment, position = (segment + 1, 0) if fresh else (segment, position + 1)
            row.append((token, segment, position, document, offset))
        yield np.array(row, np.int32).T


@pytest.mark.parametrize("length", [1, 2, 8, 15, 64])
def test_one_pass_equals_packing_by_hand(documents, length):
    rows = list(rows_once(documents, np.arange(len(documents)), Bytes(), length=length))
    order = document_order(rows)
    order += sorted(set(range(len(LENGTHS))) - set(order))  # may begin only in the unfull last row
    expected = list(packed_by_hand(documents, order, length))
    assert len(rows) == len(expected) == sum(size + 2 for size in LENGTHS) // length
    for row, wanted in zip(rows, expected, strict=True):
        got = np.stack([getattr(row, name) for name in FIELDS])
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, wanted)


def test_every_epoch_has_every_document_once_in_a_new_order(documents):
    rows = rows_of(documents)
    count = len(LENGTHS)
    order = document_order([next(rows) for _ in range(70)])[: 3 * count]
    epochs = [order[:count], order[count : 2 * count], order[2 * count :]]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_decides_the_order(documents):
    def order(seed):
        return document_order(itertools.islice(rows_of(documents, seed=seed), 16))

    assert order(3) == order(3) != order(4)


def test_streams_take_turns_and_share_the_documents(documents):
    rows = rows_of(documents, streams=3)
    taken = [next(rows) for _ in range(60)]
    shares = [{int(d) for row in taken[turn::3] for d in row.documents_T} for turn in range(3)]
    assert sorted(d for share in shares for d in share) == list(range(len(LENGTHS)))
    assert rows_of(documents, streams=99).get_state()["streams"] == len(LENGTHS)


@pytest.mark.parametrize("streams", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_resumes_exactly_after_any_row_and_across_epochs(documents, streams):
    # 125 tokens an epoch: 50 rows of 8 cross three epoch boundaries.
    rows, states, expected = rows_of(documents, streams=streams), [], []
    for _ in range(50):
        states.append(json.dumps(rows.get_state()))
        expected.append(next(rows))
    for place, state in enumerate(states):
        assert len(state) < 500 * streams
        resumed = rows_of(documents, streams=streams)
        resumed.set_state(json.loads(state))
        assert json.loads(json.dumps(resumed.get_state())) == json.loads(state)
        for wanted in expected[place : place + 6]:
            assert same(next(resumed), wanted), f"resumed before row {place}"


def test_rewinds_an_iterator_in_use(documents):
    rows = rows_of(documents)
    state = json.loads(json.dumps(rows.get_state()))
    first = [next(rows) for _ in range(5)]
    rows.set_state(state)
    assert all(same(next(rows), wanted) for wanted in first)


def _tokens_after(documents, state, queue):
    rows = rows_of(documents)
    rows.set_state(json.loads(state))
    queue.put(np.stack([next(rows).tokens_T for _ in range(20)]))


def test_resumes_exactly_in_another_process(documents):
    rows = rows_of(documents)
    for _ in range(13):
        next(rows)
    state = json.dumps(rows.get_state())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_tokens_after, args=(documents, state, queue))
    process.start()
    got = queue.get(timeout=60)
    process.join(timeout=60)
    assert process.exitcode == 0
    np.testing.assert_array_equal(got, np.stack([next(rows).tokens_T for _ in range(20)]))


@pytest.mark.parametrize(
    "change", [{"length": 9}, {"seed": 4}, {"source": "other files"}], ids=lambda c: next(iter(c))
)
def test_refuses_the_position_of_another_stream(documents, change):
    state = rows_of(documents).get_state()
    with pytest.raises(ValueError, match=f"{next(iter(change))} was"):
        rows_of(documents, **change).set_state(state)


def test_refuses_a_state_of_something_else(documents):
    with pytest.raises(ValueError, match="tokenizer was None"):
        rows_of(documents).set_state({"next_index": 3})


def test_refuses_a_seed_out_of_range(documents):
    with pytest.raises(ValueError, match="seed=-1"):
        rows_of(documents, seed=-1)


def test_grain_stays_out_of_a_plain_import():
    heavy = ["jax", "flax", "grain", "pyarrow", "tokenizers"]
    code = f"import sys, dsjax.data; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stdout + loaded.stderr


def shared_out(documents, *, owners: int, each: int, count: int, streams: int = 3):
    """`count` rows in steps of `owners * each`, made by `owners` iterators, each its own places."""
    iterators = [rows_of(documents, streams=streams) for _ in range(owners)]
    taken = []
    for _ in range(count // (owners * each)):
        parts = [
            rows.take(owners * each, range(owner * each, (owner + 1) * each))
            for owner, rows in enumerate(iterators)
        ]
        for candidates in zip(*parts, strict=True):
            (made,) = [row for row in candidates if row is not None]
            taken.append(made)
    return taken, iterators


@pytest.mark.parametrize(("owners", "each"), [(1, 4), (2, 1), (2, 2), (3, 1), (4, 1)])
def test_the_order_of_rows_does_not_depend_on_who_makes_them(documents, owners, each):
    alone = rows_of(documents, streams=3)
    taken, _ = shared_out(documents, owners=owners, each=each, count=36)
    assert len(taken) == 36
    assert all(same(row, next(alone)) for row in taken)


@pytest.mark.parametrize(
    ("owners", "each", "count"), [(2, 2, 12), (2, 2, 20), (4, 1, 8), (3, 1, 36)]
)
def test_shared_rows_resume_with_any_number_of_processes(documents, owners, each, count):
    alone = rows_of(documents, streams=3)
    for _ in range(count):
        next(alone)
    _, iterators = shared_out(documents, owners=owners, each=each, count=count)
    state = merged([json.loads(json.dumps(rows.get_state())) for rows in iterators])
    assert state == json.loads(json.dumps(alone.get_state()))
    later = [next(alone) for _ in range(4)]
    for rows in (rows_of(documents, streams=3), iterators[-1]):
        rows.set_state(state)
        assert all(same(next(rows), wanted) for wanted in later)


def test_a_process_packs_only_the_streams_it_has_rows_of(documents):
    rows = rows_of(documents, streams=3)
    share = {int(d) for row in [next(rows) for _ in range(60)][1::3] for d in row.documents_T}
    read = []

    class Watched(Documents):
        def read(self, document):
            read.append(document)
            return super().read(document)

    rows = rows_of(Watched(documents._files), streams=3)
    for _ in range(20):
        assert [row is None for row in rows.take(3, [1])] == [True, False, True]
    # Before get_state(), which makes the packers of the other streams, and these read ahead.
    assert set(read) == share
    states = rows.get_state()["packers"]
    assert [state is None for state in states] == [True, False, True]
