"""Both tokenizers against golden encodings and against the `tokenizers` library's own decoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from dsjax.data import Bytes, HuggingFace, load_tokenizer
from tests.data.corpus import TEXTS, write_tokenizer

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"
DEEPSEEK = CHECKPOINTS / "deepseek_v3.tokenizer.json"
needs_deepseek = pytest.mark.skipif(
    not DEEPSEEK.is_file(), reason="the published DeepSeek-V3 tokenizer is not on this machine"
)
# Every UTF-8 length, a zero-width joiner sequence, and whitespace that tokenizers like to merge.
MIXED = (
    "\u00e9 \u00df \u4f60\u597d\uff0c\u4e16 \U0001f469\u200d\U0001f467 \t\n  x\r\n\x00 "
    "\U0001f1e9\U0001f1ea"
)
# Written by names: the bars and blanks in these tokens are not ASCII.
BAR, BLANK = "\N{FULLWIDTH VERTICAL LINE}", "\N{LOWER ONE EIGHTH BLOCK}"


@pytest.fixture(scope="module")
def deepseek():
    return HuggingFace(DEEPSEEK)


@pytest.fixture
def tiny(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path))


def test_bytes_ids_are_the_bytes():
    tokenizer = Bytes()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert tokenizer.encode_document("").tolist() == [256, 257]
    assert tokenizer.encode_document(b"a").tolist() == [256, 97, 257]
    assert tokenizer.encode_prompt("a").tolist() == [256, 97]
    assert tokenizer.encode_document("a").dtype == tokenizer.encode("").dtype == np.int32
    assert tokenizer.bytes_per_token.tolist() == [1] * 256 + [0, 0]
    assert tokenizer.decode(tokenizer.encode_document(MIXED)) == MIXED
    assert tokenizer.decode([97, 0xC3, 258]) == "a\ufffd\ufffd"


@needs_deepseek
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [19923, 14, 2058, 3]),
        (
            "\u4f60\u597d\N{FULLWIDTH COMMA}\u4e16\u754c\N{FULLWIDTH EXCLAMATION MARK}",
            [30594, 303, 3427, 1175],
        ),
        ("1234567 + 89", [6895, 18009, 25, 940, 223, 4362]),
        (
            "def f(x):\n    return x**2",
            [3465, 285, 4042, 3395, 361, 1354, 1527, 666, 20],
        ),
        (f"<{BAR}User{BAR}>hi<{BAR}Assistant{BAR}>", [128803, 6366, 128804]),
    ],
)
def test_deepseek_golden_encodings(deepseek, text, ids):
    assert deepseek.encode(text).tolist() == ids
    assert deepseek.encode(text.encode()).tolist() == ids
    assert deepseek.encode_prompt(text).tolist() == [0, *ids]
    assert deepseek.encode_document(text).tolist() == [0, *ids, 1]
    assert deepseek.decode([0, *ids, 1]) == text


@needs_deepseek
def test_deepseek_vocabulary(deepseek):
    assert (deepseek.num_tokens, deepseek.bos_id, deepseek.eos_id) == (128_815, 0, 1)
    assert deepseek.bytes_per_token.shape == (128_815,)
    assert deepseek.bytes_per_token[[0, 1, 2, 128_000]].tolist() == [0, 0, 0, 0]
    assert deepseek.decode([0, 128_815, 129_279]) == "\ufffd\ufffd"


@needs_deepseek
def test_deepseek_pieces_equal_the_librarys_decoder(deepseek):
    library = tokenizers.Tokenizer.from_file(str(DEEPSEEK))
    ids = np.random.default_rng(0).integers(0, 128_815, 3000)
    assert deepseek.decode(ids) == library.decode(ids.tolist(), skip_special_tokens=True)
    encoded = deepseek.encode(MIXED)
    assert deepseek.bytes_per_token[encoded].sum() == len(MIXED.encode())


def test_tiny_round_trip_and_byte_counts(tiny):
    for text in [*TEXTS, MIXED, ""]:
        ids = tiny.encode(text)
        assert tiny.decode(ids) == text
        assert tiny.bytes_per_token[ids].sum() == len(text.encode())
        assert tiny.encode_document(text).tolist() == [0, *ids, 1]
        assert tiny.decode(tiny.encode_document(text)) == text
    assert len(tiny.encode(TEXTS[6])) < len(TEXTS[6]) / 2, "no merges: the test shows nothing"


@pytest.mark.parametrize("kind", ["bytes", "tiny"])
def test_stream_emits_whole_characters_as_soon_as_they_are_complete(kind, tiny):
    tokenizer = Bytes() if kind == "bytes" else tiny
    stream, shown = tokenizer.stream(), ""
    ids = tokenizer.encode_document(MIXED).tolist()
    for count, token in enumerate(ids, start=1):
        shown += stream.add(token)
        raw = b"".join(tokenizer._pieces[i] for i in ids[:count])
        assert shown == raw.decode("utf-8", "ignore")  # "ignore" drops only the unfinished end
    assert shown == MIXED and stream.end() == ""


def test_stream_shows_broken_bytes_and_an_unfinished_end():
    stream = Bytes().stream()
    assert [stream.add(0xE4), stream.add(0xBD), stream.add(97)] == ["", "", "\ufffda"]
    assert [stream.add(999), stream.add(0xC3), stream.end()] == ["\ufffd", "", "\ufffd"]


def test_begin_is_set_exactly_once_even_if_the_file_has_a_template(tmp_path):
    path = write_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(path))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.save(str(path))
    config = {"bos_token": "<bos>", "eos_token": "<eos>"}
    for adds, begin in [(None, [0]), (True, [0]), (False, [])]:
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(config | {"add_bos_token": adds})
        )
        tokenizer = load_tokenizer(tmp_path)
        ids = tokenizer.encode("zyxw vuts").tolist()
        assert len(ids) >= 8 and 0 not in ids and 1 not in ids
        assert tokenizer.encode_document("zyxw vuts").tolist() == [*begin, *ids, 1]


def test_without_config_there_is_no_begin_and_documents_have_no_end(tmp_path):
    path = write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos_id is None and tokenizer.eos_id is None
    assert tokenizer.encode_prompt("a").tolist() == tokenizer.encode("a").tolist()
    with pytest.raises(ValueError, match=r"no end-of-document token.*tokenizer_config\.json"):
        tokenizer.encode_document("a")


def test_refuses_contradictory_configs(tmp_path):
    with pytest.raises(ValueError, match="eos_token '</s>' is not in the vocabulary"):
        load_tokenizer(write_tokenizer(tmp_path, eos_token="</s>"))
    with pytest.raises(ValueError, match="names no bos_token"):
        load_tokenizer(write_tokenizer(tmp_path, bos_token=None))
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")


EMPTY = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json is no tokenizer .* download the published"),
        ("tokenizer.json", b"no JSON", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json is no tokenizer .*utf-8"),
        ("tokenizer.json", EMPTY.encode(), "tokenizer.json has an empty vocabulary"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not readable JSON .* remove it"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not readable JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a JSON list"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "tokenizer_config.json: bos_token is 5"),
        (
            "tokenizer_config.json",
            b'{"eos_token": {"content": 5}}',
            r"tokenizer_config.json: eos_token is \{'content': 5\}; it must be a text or null",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, told):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        load_tokenizer(tmp_path)


def test_fingerprint_sees_the_file_and_the_config(tmp_path):
    prints = {
        load_tokenizer(write_tokenizer(tmp_path / str(number), **changes)).fingerprint
        for number, changes in enumerate([{}, {"vocab_size": 310}, {"add_bos_token": False}, {}])
    }
    assert len(prints) == 3


def test_sentence_piece_pieces(tmp_path):
    # Hand-made: "▁" is a space, <0x..> a byte; 4 is an added token that is not special.
    vocabulary = {"<unk>": 0, f"{BLANK}the": 1, "<0xC3>": 2, "<0xA9>": 3}
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(BLANK, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    library.add_special_tokens(["<unk>"])
    library.add_tokens(["<x>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bytes_per_token.tolist() == [0, 4, 1, 1, 3]
    assert tokenizer.decode([1, 2, 3, 4]) == " theé<x>" == library.decode([1, 2, 3, 4])


def test_refuses_to_guess_the_bytes_of_other_families(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}))
    library.decoder = tokenizers.decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="decoder \\['WordPiece'\\]"):
        _ = load_tokenizer(tmp_path).bytes_per_token
