"""A model of SmolLM2-135M's shape with random weights, and a reward that tells its answers apart. Nothing is fetched.

What it answers is noise, as long as it may be: good for tokens a second and for memory, and for nothing else.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

LAYERS = 30


def write_model(folder: Path) -> Path:
    """In bf16, with the tokenizer of the built-in policy, whose tokens are the first few of this vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rl.model_files import BUILTIN

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).bfloat16().save_pretrained(folder)
    for file in (BUILTIN / "tiny").glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


def varied(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> float:
    """A coin that the response decides: equal rewards in a group would leave nothing to train on."""
    return float(zlib.crc32(response.encode()) % 2)
