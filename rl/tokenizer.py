"""A model's tokenizer: its files, and the tokens that they name."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rl.model_shape import ModelRefused

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")  # one of them holds the vocabulary


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ModelRefused. Without a vocabulary transformers would make an empty tokenizer, which drops every character."""
    if not has_tokenizer(folder):
        raise ModelRefused(
            f"{folder} has no tokenizer", f"put the model's {FILES[0]} there (or {', '.join(FILES[1:])})"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds, from json's to those of a Rust library
        says = f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error})"
        raise ModelRefused(says, "fetch its files again") from error


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab: int) -> dict[int, str]:
    """Tokens in the tokenizer's files whose ids an embedding of `vocab` rows has not, by id.

    Without the unknown and the padding token, which classes of transformers put behind the others where a model has
    none: no text is encoded to them by a tokenizer that knows bytes, and padding is not embedded here.
    """
    file, found = folder / "tokenizer.json", tokenizer.get_vocab()
    if file.exists():  # what a class adds when it is loaded is in none of the files
        content = json.loads(file.read_text(encoding="utf-8"))
        pieces = content["model"]["vocab"]
        found = dict(pieces) if isinstance(pieces, dict) else {piece: i for i, (piece, _) in enumerate(pieces)}
        found |= {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    spare = (tokenizer.unk_token, tokenizer.pad_token)
    return {i: token for token, i in sorted(found.items()) if i >= vocab and token not in spare}
