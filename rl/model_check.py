"""Do a model's files agree? Its config.json, checkpoint and tokenizer, before anything heavy starts.

A config.json is believed by whatever loads the model: what it denies is dropped without a word, what it invents
is random.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rl.model_files import model_config
from rl.model_shape import ModelRefused
from rl.policy import EMBEDDING, HEAD, layout
from rl.stops import stop_tokens
from rl.stored_weights import Stored, stored_tensors
from rl.tokenizer import load_tokenizer, tokens_beyond
from rl.weights import PIECE

_TABLES = "rotary_emb.inv_freq"  # in checkpoints of old; they are computed


def check_model(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelRefused, with the fix, or ModelNotFound. Reads headers, and a head only if the config denies it."""
    config, stored = model_config(str(folder)), stored_tensors(folder)
    vocab, pad = config["vocab_size"], config.get("pad_token_id")
    if pad is not None and not -vocab <= pad < vocab:
        raise ModelRefused(
            f"{folder / 'config.json'}: pad_token_id {pad} is no token of a vocabulary of {vocab}", "set it to null"
        )
    _check_tensors(folder, stored, config)
    if config.get("tie_word_embeddings", False):
        _check_tie(folder, stored)
    tokenizer = load_tokenizer(folder)
    _check_tokenizer(tokenizer, folder, vocab)
    stop_tokens(folder, tokenizer)
    return tokenizer


def _check_tensors(folder: Path, stored: dict[str, Stored], config: dict[str, Any]) -> None:
    """The checkpoint has every tensor of the model that config.json describes, in its shape, and no more of the stack."""
    expected = _expected(folder)
    numbers = [int(found[1]) for name in stored if (found := re.match(r"model\.layers\.(\d+)\.", name))]
    layers = max(numbers, default=-1) + 1
    if layers > config["num_hidden_layers"]:
        raise ModelRefused(
            f"{folder / 'config.json'}: num_hidden_layers is {config['num_hidden_layers']}, and the checkpoint has "
            f"{layers} layers",
            f"set num_hidden_layers to {layers}",
        )
    for name, shape in expected.items():
        _check_tensor(folder, name, shape, stored.get(name))
    others = [n for n in stored if n.startswith("model.") and n not in expected and not n.endswith(_TABLES)]
    if others:
        raise ModelRefused(
            f"{folder} holds {others[0]!r}, which is no part of the model that its config.json describes",
            "correct config.json (attention_bias, mlp_bias, model_type)",
        )


def _check_tensor(folder: Path, name: str, shape: tuple[int, ...], found: Stored | None) -> None:
    if found is None:
        fix = "fetch the checkpoint again, or correct config.json"
        if name == HEAD:
            fix = "set tie_word_embeddings to true in config.json if the embedding is the head, else fetch it again"
        raise ModelRefused(f"{folder} holds no tensor {name!r}, which its config.json describes", fix)
    if found.shape != shape:
        fix = "correct config.json, or fetch the checkpoint that belongs to it"
        if name in (EMBEDDING, HEAD) and found.shape[1:] == shape[1:]:
            fix = f"set vocab_size to {found.shape[0]} in config.json"
        raise ModelRefused(f"{folder}: {name} is {found.shape}, its config.json makes it {shape}", fix)


def _expected(folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        return layout(folder)
    except Exception as error:  # of many kinds: types, divisions, an unknown rope
        says = f"transformers refuses {folder / 'config.json'} ({type(error).__name__}: {error})"
        raise ModelRefused(says, "correct config.json") from error


def _check_tie(folder: Path, stored: dict[str, Stored]) -> None:
    """transformers unties such a model with a warning; a run would drop the head."""
    if HEAD not in stored:
        return
    embedding, head = stored[EMBEDDING], stored[HEAD]
    same = embedding.shape == head.shape and all(
        np.array_equal(embedding.read(i, j), head.read(i, j), equal_nan=True)
        for i, j in ((i, min(i + PIECE, head.size)) for i in range(0, head.size, PIECE))
    )
    if not same:
        raise ModelRefused(
            f"{folder / 'config.json'} ties head and embedding, and the checkpoint has a {HEAD} of other numbers",
            "set tie_word_embeddings to false there",
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab: int) -> None:
    beyond = tokens_beyond(tokenizer, folder, vocab)
    if beyond:
        largest = max(beyond)
        raise ModelRefused(
            f"the tokenizer in {folder} has a token {beyond[largest]!r} of id {largest}, and the model embeds {vocab}",
            "use the tokenizer that belongs to the model, take the token out of it, or resize the embedding",
        )
