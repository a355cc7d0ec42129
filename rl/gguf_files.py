"""A model in a GGUF file: its metadata, and the folder of float32 safetensors that it becomes."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.file_digest import file_digest
from rl.model_shape import ModelNotFound, ModelRefused, ModelShape, check_family, shape_of

if TYPE_CHECKING:
    from gguf import GGUFReader


def cache_folder() -> Path:
    """Where converted models are kept; `NORTHSTAR_CACHE` moves it."""
    return Path(os.environ.get("NORTHSTAR_CACHE", Path.home() / ".cache" / "northstar"))


def gguf_shape(file: Path) -> ModelShape:
    """From the metadata alone. Raises ModelNotFound."""
    chat = gguf_reader(file).get_field("tokenizer.chat_template") is not None
    return shape_of(gguf_config(file), str(file), chat)


def gguf_config(file: Path) -> dict[str, Any]:
    """The keys of a config.json, as far as the file has them. Raises ModelNotFound."""
    reader = gguf_reader(file)
    architecture = reader.get_field("general.architecture")
    arch = None if architecture is None else architecture.contents()
    check_family({"model_type": arch}, str(file))
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")

    def number(key: str, default: int | None = None) -> int | None:
        field = reader.get_field(f"{arch}.{key}")
        return default if field is None else int(field.contents())

    heads = number("attention.head_count")
    found = {
        "model_type": arch,
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length"),
    }
    positions = number("context_length")
    return found if positions is None else found | {"max_position_embeddings": positions}


def gguf_reader(file: Path) -> GGUFReader:
    """The file's metadata and packed tensors. Raises ModelNotFound."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelNotFound(f"{str(file)!r} needs the gguf extra: pip install 'northstar[gguf]'") from error
    try:
        return _parsed(GGUFReader, file, file.stat().st_mtime_ns)
    except (ValueError, IndexError) as error:
        raise ModelNotFound(f"{str(file)!r} is not a whole GGUF file: {error}") from error


@lru_cache(maxsize=1)
def _parsed(reader: type[GGUFReader], file: Path, changed: int) -> GGUFReader:
    """Reading a vocabulary takes seconds."""
    return reader(file)


def converted_folder(file: Path) -> Path:
    """Where a GGUF file's float32 safetensors are, or will be: by what it holds, as fine-tunes may share name and size."""
    return cache_folder() / f"{file.stem}-{_digest(file, file.stat().st_mtime_ns)}"


@lru_cache
def _digest(file: Path, changed: int) -> str:
    return file_digest(file)


def convert(file: Path) -> Path:
    """Dequantise once into a folder of float32 safetensors, so that stages can read single layers of it."""
    from filelock import FileLock

    out = converted_folder(file)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock", timeout=1800):
        if not out.exists():
            partial = out.with_name(out.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _write(file, partial)
            except Exception as error:  # of many kinds, those of a Rust library among them
                says = f"transformers cannot convert {str(file)!r} ({type(error).__name__}: {error})"
                raise ModelRefused(says, "fetch it again, or set model.path to the model in safetensors") from error
            partial.rename(out)
    return out


def _write(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # dequantize=True: else the weights stay packed and can be neither saved nor trained
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    reader = gguf_reader(file)
    if reader.get_field("tokenizer.ggml.eos_token_id") is None:  # then it is the default of a class
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert tokens is not None, "a tokenizer was made of them"
    _keep_tokens(folder / "tokenizer.json", len(tokens.data))


def _keep_tokens(tokenizer: Path, count: int) -> None:
    """The first `count`: a class of transformers puts `<|endoftext|>` behind them where it is not one of them."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
    tokenizer.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
