"""Documents shuffled, tokenized and packed into rows of equal length, resumable at any row.

The order of rows is a pure function of documents, tokenizer, length, seed and the number of
streams: no process count enters it. Row r is the next one of stream r % streams, so a process packs
only the streams that it has rows of, and any number of processes make the same rows.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from dsjax.data.documents import Documents, Unreadable
from dsjax.data.tokenizers import Bytes, HuggingFace

# Columns of the array that goes through grain's packer, which splits all of them alike.
TOKEN, DOCUMENT, OFFSET = range(3)
PIECE = "piece"
# Streams of a process that read ahead, each with a thread of its own.
THREADS = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """T neighbouring tokens of the packed stream, with everything needed to keep documents apart.

    `segments_T` numbers the documents inside the row from 1 (0 would be padding), `positions_T`
    counts from 0 within each segment. `documents_T` and `offsets_T` say where a token comes from:
    the number for `Dataset.locate` (-1 would be padding) and its place among the tokens of that
    document, which differs from the position where a document began in an earlier row.
    """

    tokens_T: Int32[np.ndarray, " T"]
    segments_T: Int32[np.ndarray, " T"]
    positions_T: Int32[np.ndarray, " T"]
    documents_T: Int32[np.ndarray, " T"]
    offsets_T: Int32[np.ndarray, " T"]


class RowIterator:
    """Endless training rows; every pass over the documents is in a new order drawn from `seed`.

    Rows come in turn from `streams` packers, each with its own share of the documents: a long
    document fills many rows, and taken one after the other they would fill whole batches.
    `get_state()` is a small dict for JSON; after `set_state()` of it, here or in another process,
    `next()` gives what would have come next. Where processes share the rows, each has the state of
    its own streams only, and `merged` puts these together.
    """

    def __init__(
        self,
        documents: Documents,
        chosen: np.ndarray,
        tokenizer: Bytes | HuggingFace,
        *,
        length: int,
        seed: int,
        source: str,
        streams: int,
    ):
        """`chosen`: numbers of the documents to read. `source`: their fingerprint."""
        import grain

        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must lie between 0 and 2**32 - 1")
        streams = min(streams, len(chosen))
        mixed = np.random.default_rng(seed).permutation(chosen)

        def packer(stream: int, threads: int):
            share = grain.MapDataset.source(mixed[stream::streams])
            order = share.seed(seed).shuffle().repeat()
            return iter(_packed(order, documents, tokenizer, length, threads=threads))

        self._new_packer, self._streams = packer, streams
        self._restart(0, [None] * streams)
        self._made_for = {
            "source": source,
            "tokenizer": tokenizer.fingerprint,
            "length": length,
            "seed": seed,
            "streams": streams,
        }

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        (row,) = self.take(1, [0])
        return row

    def take(self, count: int, wanted: Collection[int]) -> list[Row | None]:
        """The next `count` rows; None at the places that are not `wanted`, which cost nothing."""
        taken = [
            self._made(self._next + place) if place in wanted else None for place in range(count)
        ]
        self._next += count
        return taken

    def get_state(self) -> dict:
        """Of a stream with rows that were not wanted here, the state is None."""
        packers = [self._state(stream) for stream in range(self._streams)]
        return {**self._made_for, "turn": self._next % self._streams, "packers": packers}

    def set_state(self, state: dict) -> None:
        """ValueError if the state was saved over other documents, tokenizer, length or seed."""
        changed = [
            f"{key} was {state.get(key)!r}, is {value!r}"
            for key, value in self._made_for.items()
            if state.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"this data position belongs to another stream of rows: {'; '.join(changed)}. "
                "Continue with the data, tokenizer, batch.length and seed of the saved run, or "
                "start a new run_dir"
            )
        self._restart(state["turn"], state["packers"])

    def _restart(self, turn: int, saved: list[dict | None]) -> None:
        """Rows are counted from the last one whose turn was stream 0."""
        self._next, self._saved = turn, saved
        self._packers = {}
        self._counts = [self._due(stream) for stream in range(self._streams)]

    def _due(self, stream: int) -> int:
        """Rows of the stream before the next one."""
        return (self._next - stream + self._streams - 1) // self._streams

    def _state(self, stream: int) -> dict | None:
        if self._counts[stream] != self._due(stream):
            return None
        untouched = stream not in self._packers and self._saved[stream] is not None
        return self._saved[stream] if untouched else self._packer(stream).get_state()

    def _made(self, number: int) -> Row:
        stream = number % self._streams
        packer = self._packer(stream)
        # Rows of the same stream that others wanted.
        while self._counts[stream] < number // self._streams:
            next(packer)
            self._counts[stream] += 1
        self._counts[stream] += 1
        return _row(next(packer))

    def _packer(self, stream: int):
        if stream not in self._packers:
            packer = self._new_packer(stream, threads=int(len(self._packers) < THREADS))
            if (saved := self._saved[stream]) is not None:
                # A packer tells "nothing left over" by comparing with a tuple; JSON knows only
                # lists, and a list would make it drop a whole document.
                spans = {key: tuple(span) for key, span in saved["remainder_slices"].items()}
                packer.set_state({**saved, "remainder_slices": spans})
            self._packers[stream] = packer
        return self._packers[stream]


def merged(states: Sequence[dict]) -> dict:
    """One state of the states that the processes have after the same row, each made by some."""
    streams = zip(*(state["packers"] for state in states), strict=True)
    packers = [next(packer for packer in known if packer is not None) for known in streams]
    return {**states[0], "packers": packers}


def rows_once(
    documents: Documents, chosen: np.ndarray, tokenizer: Bytes | HuggingFace, *, length: int
) -> Iterator[Row]:
    """One pass over the documents in a fixed mixed order; a last row not full is left out."""
    import grain

    if not len(chosen):
        return
    order = grain.MapDataset.source(chosen).seed(0).shuffle()
    for packed in _packed(order, documents, tokenizer, length):
        row = _row(packed)
        if row.segments_T[-1] != 0:
            yield row


def _packed(
    order, documents: Documents, tokenizer: Bytes | HuggingFace, length: int, *, threads: int = 1
):
    """grain dataset of packed rows over a grain dataset of document numbers."""
    import grain

    def tokenize(document: np.integer) -> dict[str, np.ndarray]:
        number = int(document)
        try:
            tokens = tokenizer.encode_document(documents.read(number))
        except UnicodeDecodeError as error:
            raise Unreadable(f"{documents.locate(number)} is not UTF-8: {error}") from error
        piece = np.empty((len(tokens), 3), np.int32)
        piece[:, TOKEN] = tokens
        piece[:, DOCUMENT] = number
        piece[:, OFFSET] = np.arange(len(tokens))
        return {PIECE: piece}

    # A thread for each stream keeps a document or two ahead and leaves the cores to the step.
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    pieces = order.map(tokenize).to_iter_dataset(ahead)
    return grain.experimental.ConcatThenSplitIterDataset(pieces, length_struct={PIECE: length})


def _row(packed: dict[str, np.ndarray]) -> Row:
    piece, segments_T = packed[PIECE], packed[f"{PIECE}_segment_ids"]
    return Row(
        tokens_T=np.ascontiguousarray(piece[:, TOKEN]),
        segments_T=segments_T,
        positions_T=packed[f"{PIECE}_positions"],
        documents_T=np.where(segments_T == 0, np.int32(-1), piece[:, DOCUMENT]),
        offsets_T=np.ascontiguousarray(piece[:, OFFSET]),
    )
