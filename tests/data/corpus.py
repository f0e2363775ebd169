"""A small folder of documents in all three formats, and a tokenizer made for it, as fixtures."""

import json
from pathlib import Path

import tokenizers

TEXTS = [f"document {number}: " + "the cat sät on a mat. " * (number % 7) for number in range(40)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    lines = [json.dumps({field: text, "id": number}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, *, vocab_size: int = 300, **config: object) -> Path:
    """Byte-level BPE trained on TEXTS, with `tokenizer_config.json` beside it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | config))
    return folder / "tokenizer.json"
