"""The bytes each token of a `tokenizer.json` stands for."""

import re


def token_pieces(definition: dict, vocabulary: dict[str, int]) -> list[bytes]:
    """Bytes of every id up to the largest; none for special tokens and for ids without a token.

    `definition` is the parsed `tokenizer.json`. Two families are read: byte-level BPE (DeepSeek,
    GPT, Llama 3, Qwen) and SentencePiece (`▁` for a space, `<0x0A>` for a byte), where a space
    that the tokenizer itself puts before a text stays visible. ValueError for any other.
    """
    decoders = _decoder_types(definition)
    if "ByteLevel" in decoders:
        read = _byte_level
    elif decoders & {"Metaspace", "ByteFallback"}:
        read = _sentence_piece
    else:
        raise ValueError(
            f"tokenizer.json has decoder {sorted(decoders)}; only byte-level BPE ('ByteLevel') and "
            "SentencePiece ('Metaspace' or 'ByteFallback') tell how many bytes a token stands for"
        )
    added = {token["id"]: token for token in definition.get("added_tokens") or []}
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if number not in added:
            pieces[number] = read(token)
        elif not added[number]["special"]:
            pieces[number] = token.encode("utf-8")
    return pieces


def _decoder_types(definition: dict) -> set[str]:
    decoder = definition.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return {part["type"] for part in parts if "type" in part}


def _printable_bytes() -> dict[str, int]:
    """Byte-level BPE spells bytes as printable characters: printable Latin-1 as itself, the other
    bytes, in order, as the characters from U+0100 on (GPT-2, Radford et al. 2019, its encoder).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _printable_bytes()


def _byte_level(token: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in token)


def _sentence_piece(token: str) -> bytes:
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(byte[1])
    return token.replace("▁", " ").encode("utf-8")
