"""Where an answer ends: at tokens that one of a model's files names as an end, and at texts that a task names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from rl.model_shape import ModelRefused
from rl.tokenizer import has_tokenizer, load_tokenizer

_ANSWER = "what-the-assistant-says"


class StopTexts:
    """Texts that end a turn, with the token that completes the first of them. Raises ValueError for one that none can.

    They are looked for as vLLM looks for its `stop`: in the turn's own text, token by token, special tokens included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"task.stop needs a tokenizer.json of the model, not a {type(tokenizer).__name__}")
        self.texts, self.backend = texts, backend
        for text in texts:
            said = backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            if not text or text.strip() not in said:
                raise ValueError(
                    f"task.stop {text!r}: the model's tokenizer makes {said!r} of it, so no turn ends there"
                )

    def turn(self, behind: list[int]) -> TurnText:
        """What is said behind these tokens."""
        return TurnText(self, behind)


class TurnText:
    """A turn as it is said."""

    def __init__(self, stops: StopTexts, behind: list[int]):
        self._stops, self._stream = stops, DecodeStream(ids=behind, skip_special_tokens=False)
        self._kept, self._said = max(map(len, stops.texts)) - 1, ""

    def ends_with(self, token: int) -> bool:
        """Whether it holds one of the texts, now that the token is said."""
        said = self._said + (self._step(token) or "")
        self._said = said[len(said) - self._kept :] if len(said) > self._kept else said
        return any(text in said for text in self._stops.texts)

    def _step(self, token: int) -> str | None:
        try:
            return self._stream.step(self._stops.backend, token)
        except Exception:  # bytes that are no text after all: vLLM begins anew there too
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._stops.backend, token)


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Ids, sorted: those of config.json, of generation_config.json and of the tokenizer, and the chat template's.

    `tokenizer`: the folder's, where it is loaded already: it takes a second for a large vocabulary.

    The template's count whether or not prompts are wrapped in it: a token that ends a turn is no part of an answer,
    and a tuned model ends its answers with it all the same. Defaults of transformers' classes do not count (2 for
    a Llama): what the files do not name may be any token. Raises ModelRefused if none is named, or one is no token.
    """
    config = _read(folder / "config.json")
    vocab, found = config["vocab_size"], set()
    for name, content in (
        ("config.json", config),
        ("generation_config.json", _read(folder / "generation_config.json")),
    ):
        named = ends_named(content)
        if wrong := [i for i in named if not 0 <= i < vocab]:
            raise ModelRefused(
                f"{folder / name}: eos_token_id {wrong[0]} is no token of a vocabulary of {vocab}",
                "name there the token that ends an answer",
            )
        found |= named
    if tokenizer is None and has_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        ends = (tokenizer.eos_token_id, end_of_turn(tokenizer))
        # a class's own default has no row, and is never drawn
        found |= {i for i in ends if isinstance(i, int) and i < vocab}
    if not found:
        raise ModelRefused(
            f"{folder} names no token that ends an answer, neither in config.json, generation_config.json nor in its "
            f"tokenizer",
            "add its eos_token_id to config.json, or an eos_token to tokenizer_config.json",
        )
    return sorted(found)


def ends_named(content: dict[str, Any]) -> set[int]:
    """By `eos_token_id`: one, some or none."""
    eos = content.get("eos_token_id")
    return set() if eos is None else {*eos} if isinstance(eos, list) else {eos}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template goes on right behind an assistant's words."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError):  # made for prompts alone: then it has no end of an answer
        return None
    _, said, rest = text.rpartition(_ANSWER)
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    follows = [token for token in special if said and rest.lstrip().startswith(token)]
    return special[max(follows, key=len)] if follows else None


def _read(file: Path) -> dict[str, Any]:
    """Of a file that may be missing."""
    return json.loads(file.read_text()) if file.exists() else {}
