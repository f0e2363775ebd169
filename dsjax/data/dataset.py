"""One opened data source: training rows, held-out rows, and the score to beat."""

import dataclasses
import functools
import itertools

import numpy as np

from dsjax.data.documents import Documents, folder_documents, standard_library_documents
from dsjax.data.entropy import bigram_bits_per_byte
from dsjax.data.rows import Row, RowIterator, rows_once
from dsjax.data.tokenizers import Bytes, HuggingFace, load_tokenizer
from dsjax.run import Files, StandardLibrary

# A folder can hold terabytes; its bigram entropy has long settled after this much.
BIGRAM_BYTES = 64_000_000
HELD_OUT_TOKENS = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Documents split in two by a fixed rule, and the tokenizer that turns them into rows of T.

    `train`, `held_out`: document numbers, disjoint. `source`: fingerprint of both. `streams`: how
    many packers the training rows come from in turn; None leaves that to whoever asks for them.
    """

    documents: Documents
    tokenizer: Bytes | HuggingFace
    length: int
    train: np.ndarray
    held_out: np.ndarray
    source: str
    streams: int | None

    def train_rows(self, seed: int, *, streams: int = 1) -> RowIterator:
        """Endless rows of the training documents, shuffled anew by `seed` in every epoch.

        `streams` counts where `data.streams` is None.
        """
        return RowIterator(
            self.documents,
            self.train,
            self.tokenizer,
            length=self.length,
            seed=seed,
            source=self.source,
            streams=self.streams or streams,
        )

    def held_out_rows(self, count: int) -> list[Row]:
        """`count` rows of the held-out documents, always the same ones; fewer if few exist.

        They are evenly spaced over the first two million held-out tokens: taken in a line, a
        whole evaluation could come out of one long document.
        """
        if not count:
            return []
        rows = rows_once(self.documents, self.held_out, self.tokenizer, length=self.length)
        seen = list(itertools.islice(rows, max(count, HELD_OUT_TOKENS // self.length)))
        count = min(count, len(seen))
        return [seen[place * len(seen) // count] for place in range(count)]

    def locate(self, document: int | np.integer) -> str:
        """File and place of a document number: "path:byte_offset", or "path:row 7"."""
        return self.documents.locate(int(document))

    def bigram_bits_per_byte(self) -> float:
        """H(next byte | byte) in bits over the training bytes, at most their first 64 MB."""
        return self._bigram

    @functools.cached_property
    def _bigram(self) -> float:
        texts = (self.documents.read(int(number)) for number in self.train)
        return bigram_bits_per_byte(texts, limit=BIGRAM_BYTES)


def open_data(spec: StandardLibrary | Files, *, length: int, vocab_size: int) -> Dataset:
    """Opens what `spec` names, for rows of `length` tokens and a model of `vocab_size` ids.

    ValueError if there is nothing to read or to train on, or the tokenizer has ids beyond the
    model's vocabulary.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1 token")
    if not 0.0 <= spec.held_out < 1.0:
        raise ValueError(f"data.held_out={spec.held_out} is a share: 0.0 or more and below 1.0")
    if spec.streams is not None and spec.streams < 1:
        raise ValueError(f"data.streams={spec.streams} must be at least 1")
    match spec:
        case StandardLibrary():
            tokenizer, documents = Bytes(), standard_library_documents()
            fingerprint = f"StandardLibrary:{documents.fingerprint()}"
        case Files():
            tokenizer = load_tokenizer(spec.tokenizer)
            _check_tokenizer(tokenizer, spec.tokenizer)
            documents = folder_documents(spec.path, spec.text_field)
            fingerprint = f"Files:{spec.text_field}:{documents.fingerprint()}"
    if tokenizer.num_tokens > vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.num_tokens - 1}, the model only vocab_size="
            f"{vocab_size}; it needs model.vocab_size of at least {tokenizer.num_tokens}"
        )
    held_out = documents.held_out(spec.held_out)
    if held_out.all():
        raise ValueError(
            f"all {len(documents)} documents are held out by data.held_out={spec.held_out}, "
            "none is left for training; lower it or add documents"
        )
    return Dataset(
        documents=documents,
        tokenizer=tokenizer,
        length=length,
        train=np.flatnonzero(~held_out),
        held_out=np.flatnonzero(held_out),
        source=f"{fingerprint}:held_out={spec.held_out}",
        streams=spec.streams,
    )


def _check_tokenizer(tokenizer: HuggingFace, path: str) -> None:
    """ValueError now, not at step 0 or after all of them, if it lacks what a run asks it for."""
    tokenizer.encode_document("")
    try:
        _ = tokenizer.bytes_per_token
    except KeyError as error:
        raise ValueError(
            f"data.tokenizer={path}: a token holds {error}, which is no byte in the spelling of "
            "byte-level BPE, its decoder; give the tokenizer.json as it was published"
        ) from error
