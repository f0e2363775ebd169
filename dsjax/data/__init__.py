"""Text on disk to packed rows of tokens: `open_data(spec, length=T, vocab_size=V)`."""

from dsjax.data.dataset import Dataset, open_data
from dsjax.data.entropy import bigram_bits_per_byte
from dsjax.data.rows import Row, RowIterator, merged
from dsjax.data.tokenizers import Bytes, HuggingFace, TextStream, load_tokenizer

__all__ = [
    "Bytes",
    "Dataset",
    "HuggingFace",
    "Row",
    "RowIterator",
    "TextStream",
    "bigram_bits_per_byte",
    "load_tokenizer",
    "merged",
    "open_data",
]
