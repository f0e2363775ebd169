"""Text to token ids and back: raw bytes, or a published Hugging Face `tokenizer.json`.

Both classes have the same interface. Each id stands for a fixed piece of bytes, so `decode`,
`stream` and `bytes_per_token` never disagree about where a character ends.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dsjax.data.pieces import token_pieces

# What an id without a token (padding of the vocabulary) decodes to: seen, never an exception.
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class Bytes:
    """Each byte is its own id, 0 to 255; 256 begins a document and 257 ends it."""

    bos_id = 256
    eos_id = 257
    num_tokens = 258
    fingerprint = "bytes"

    def __init__(self):
        self._pieces = [bytes([byte]) for byte in range(256)] + [b"", b""]

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of the text alone, int32."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def encode_prompt(self, text: str | bytes) -> np.ndarray:
        """A document that goes on: what training rows begin with, then the text."""
        return np.concatenate([np.array([self.bos_id], np.int32), self.encode(text)])

    def encode_document(self, text: str | bytes) -> np.ndarray:
        """A whole document with its begin and end, as it stands in training rows."""
        return np.append(self.encode_prompt(text), np.int32(self.eos_id))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text without begin and end; bytes that are no UTF-8 become U+FFFD."""
        return _join(self._pieces, ids)

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 [num_tokens]; 0 for begin and end."""
        return np.array([len(piece) for piece in self._pieces], np.int32)

    def stream(self) -> "TextStream":
        return TextStream(self._pieces)


class HuggingFace:
    """A `tokenizer.json`, with `tokenizer_config.json` beside it for the document's begin and end.

    Begin-of-document is set by us and exactly once: the library is asked for no special tokens,
    `add_bos_token` decides, and where the config is silent, the file's own template does. Tokens
    written out in a text, such as chat markers, become their ids, as published formats want.
    """

    def __init__(self, path: str | Path):
        """ValueError if a file is broken or a named begin or end token not in the vocabulary."""
        import tokenizers

        path = Path(path)
        raw = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        # The library raises Exception itself, nothing narrower.
        except Exception as error:
            raise ValueError(
                f"{path} is no tokenizer ({error}); download the published tokenizer.json again"
            ) from error
        # A published file may ask for cut or padded encodings; documents are neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._definition = json.loads(raw)
        self._path = path
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{path} has an empty vocabulary; give the tokenizer.json of a model")
        self.num_tokens = max(vocabulary.values()) + 1

        beside = path.with_name(path.name.replace("tokenizer.json", "tokenizer_config.json"))
        config = _read_config(beside) if beside != path and beside.is_file() else {}
        self.bos_id = self._special(config, "bos_token", beside)
        self.eos_id = self._special(config, "eos_token", beside)
        by_template = self._tokenizer.encode("", add_special_tokens=True).ids[:1]
        self.adds_bos = config.get("add_bos_token")
        if self.adds_bos is None:
            self.adds_bos = self.bos_id is not None and by_template == [self.bos_id]
        if self.adds_bos and self.bos_id is None:
            raise ValueError(f"{beside} sets add_bos_token but names no bos_token; add one")
        special = f"{self.bos_id},{self.eos_id},{self.adds_bos}"
        self.fingerprint = hashlib.sha256(raw + special.encode()).hexdigest()[:16]

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of the text alone, int32. UnicodeDecodeError if bytes are not UTF-8."""
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_prompt(self, text: str | bytes) -> np.ndarray:
        """A document that goes on: begin if this tokenizer has it, then the text."""
        begin = [self.bos_id] if self.adds_bos else []
        return np.concatenate([np.array(begin, np.int32), self.encode(text)])

    def encode_document(self, text: str | bytes) -> np.ndarray:
        """A whole document with its end. ValueError if the tokenizer names no end token."""
        if self.eos_id is None:
            raise ValueError(
                f"{self._path} has no end-of-document token: put the published "
                "tokenizer_config.json, which names eos_token, beside it"
            )
        return np.append(self.encode_prompt(text), np.int32(self.eos_id))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return _join(self._pieces, ids)

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 [num_tokens]; 0 for special tokens."""
        return np.array([len(piece) for piece in self._pieces], np.int32)

    def stream(self) -> "TextStream":
        return TextStream(self._pieces)

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        return token_pieces(self._definition, self._tokenizer.get_vocab(with_added_tokens=True))

    def _special(self, config: dict, key: str, source: Path) -> int | None:
        token = config.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return None
        if not isinstance(token, str):
            raise ValueError(f"{source}: {key} is {config[key]!r}; it must be a text or null")
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{source}: {key} {token!r} is not in the vocabulary of {self._path}")
        return number


class TextStream:
    """Turns ids into text one at a time, holding back bytes until they form a character."""

    def __init__(self, pieces: list[bytes]):
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int | np.integer) -> str:
        """The text that `token` completes, possibly none."""
        return self._utf8.decode(_piece(self._pieces, token))

    def end(self) -> str:
        """What is left when no id follows: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> HuggingFace:
    """From a `tokenizer.json` or the directory that holds one. ValueError if there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"no tokenizer at {str(path)!r}; give a Hugging Face tokenizer.json or its directory"
        )
    return HuggingFace(file)


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable JSON ({error}); download the published one again, or remove "
            "it to have no begin- and end-of-document tokens"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}; it must be an object")
    return config


def _piece(pieces: list[bytes], token: int | np.integer) -> bytes:
    return pieces[token] if 0 <= token < len(pieces) else UNKNOWN


def _join(pieces: list[bytes], ids: Iterable[int] | np.ndarray) -> str:
    return b"".join(_piece(pieces, int(token)) for token in ids).decode("utf-8", "replace")
