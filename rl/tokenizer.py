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


def largest_token(folder: Path) -> tuple[int, str]:
    """The token of the highest id, of those in the files: transformers may add a class's own at the end."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return max((i, token) for token, i in load_tokenizer(folder).get_vocab().items())
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    ids = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
    added = ((token["content"], token["id"]) for token in content.get("added_tokens", ()))
    return max((i, token) for tokens in (ids, added) for token, i in tokens)
