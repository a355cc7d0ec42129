"""A GGUF file is checked as the folder of safetensors that it becomes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from deploy.config import load
from deploy.preflight import preflight
from rl.gguf_files import converted_folder
from rl.model_shape import ModelNotFound

TOKENS = [*"0123456789+=", "12", "<|im_end|>"]


def write_gguf(file: Path, rows: int, eos: int | None, merges: str = "1 2", filled: float = 0.01) -> None:
    """A random Llama of one layer whose embedding has `rows` rows, with a tokenizer of 14 tokens."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in {
        "context_length": 128,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "vocab_size": rows,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 13 + [3])
    writer.add_token_merges([merges])
    if eos is not None:
        writer.add_eos_token_id(eos)
    shapes = {"token_embd": (rows, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (n, 32) for name, n in (("q", 32), ("k", 16), ("v", 16), ("output", 32))}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, filled, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"rows": 14, "eos": 13}, None),
        (
            {"rows": 14, "eos": None},
            "names no token that ends an answer",
        ),  # not the 2 of a Llama, which is a digit here
        ({"rows": 13, "eos": 12}, "token '<|im_end|>' of id 13, and the model embeds 13"),
        ({"rows": 14, "eos": 13, "merges": "1 3"}, "transformers cannot convert"),
    ],
    ids=["sound", "no end", "a token beyond the embedding", "a broken tokenizer"],
)
def test_a_gguf_file_is_checked_as_the_folder_that_it_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict, says: str | None
):
    monkeypatch.setenv("NORTHSTAR_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf", **made)
    run = load("k5", [f"model.path={tmp_path / 'model.gguf'}", "swarm.boundaries=[]"])
    if says is None:
        preflight(run)
        return
    with pytest.raises(ModelNotFound, match=re.escape(says)):
        preflight(run)


def test_files_of_one_name_and_size_are_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NORTHSTAR_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / name / "model.gguf" for name in ("a", "b")]
    for file, filled in zip(files, (0.01, 0.02)):
        file.parent.mkdir()
        write_gguf(file, rows=14, eos=13, filled=filled)
    assert files[0].stat().st_size == files[1].stat().st_size
    assert converted_folder(files[0]) != converted_folder(files[1])
    before = converted_folder(files[1])
    files[1].write_bytes(files[0].read_bytes())
    assert converted_folder(files[1]) == converted_folder(files[0]) != before
