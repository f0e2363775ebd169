"""Documents shuffled, tokenized and packed into rows of equal length, resumable at any row.

The order of rows is a pure function of documents, tokenizer, length and seed: no process count
enters it, so any number of processes can each walk the same stream and keep their share.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from dsjax.data.documents import Documents
from dsjax.data.tokenizers import Bytes, HuggingFace

# Columns of the array that goes through grain's packer, which splits all of them alike.
TOKEN, DOCUMENT, OFFSET = range(3)
PIECE = "piece"
STREAMS = 16


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
    `next()` gives what would have come next.
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
        streams: int = STREAMS,
    ):
        """`chosen`: numbers of the documents to read. `source`: their fingerprint."""
        import grain

        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must lie between 0 and 2**32 - 1")
        streams = min(streams, len(chosen))
        mixed = np.random.default_rng(seed).permutation(chosen)
        orders = [
            grain.MapDataset.source(mixed[first::streams]).seed(seed).shuffle().repeat()
            for first in range(streams)
        ]
        self._packers = [iter(_packed(order, documents, tokenizer, length)) for order in orders]
        self._turn = 0
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
        row = _row(next(self._packers[self._turn]))
        self._turn = (self._turn + 1) % len(self._packers)
        return row

    def get_state(self) -> dict:
        packers = [packer.get_state() for packer in self._packers]
        return {**self._made_for, "turn": self._turn, "packers": packers}

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
        self._turn = state["turn"]
        for packer, saved in zip(self._packers, state["packers"], strict=True):
            # A packer tells "nothing left over" by comparing with a tuple; JSON knows only lists,
            # and a list would make it drop a whole document.
            spans = {key: tuple(span) for key, span in saved["remainder_slices"].items()}
            packer.set_state({**saved, "remainder_slices": spans})


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


def _packed(order, documents: Documents, tokenizer: Bytes | HuggingFace, length: int):
    """grain dataset of packed rows over a grain dataset of document numbers."""
    import grain

    def tokenize(document: np.integer) -> dict[str, np.ndarray]:
        number = int(document)
        try:
            tokens = tokenizer.encode_document(documents.read(number))
        except UnicodeDecodeError as error:
            raise ValueError(f"{documents.locate(number)} is not UTF-8: {error}") from error
        piece = np.empty((len(tokens), 3), np.int32)
        piece[:, TOKEN] = tokens
        piece[:, DOCUMENT] = number
        piece[:, OFFSET] = np.arange(len(tokens))
        return {PIECE: piece}

    # A thread for each stream keeps a document or two ahead and leaves the cores to the step.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
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
