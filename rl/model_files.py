"""Where a model's files are and what shape it has. No torch: used before anything heavy starts."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

BUILTIN = Path(__file__).parent / "builtin"
FAMILIES = {  # model_type of config.json -> what it is called
    "llama": "Llama 2, Llama 3, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
}
PICKED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what a run needs of a model on the hub


class ModelNotFound(ValueError):
    """`model.path` names nothing that can be loaded."""


@dataclass(frozen=True)
class ModelShape:
    """What a config check and a byte count need to know of a model."""

    hidden: int
    layers: int
    vocab: int
    tied: bool
    window: int | None  # attention reaches back this far; None: over everything
    chat: bool  # its tokenizer has a chat template


def cache_folder() -> Path:
    """Where converted models are kept; `NORTHSTAR_CACHE` moves it."""
    return Path(os.environ.get("NORTHSTAR_CACHE", Path.home() / ".cache" / "northstar"))


def model_shape(path: str) -> ModelShape | None:
    """Shape from the model's own metadata; None for a hub id that is not on this machine yet.

    Raises ModelNotFound if a local path does not exist or holds no supported model.
    """
    folder = local_folder(path)
    if folder is None:
        return _gguf_shape(_existing(path)) if path.endswith(".gguf") else None
    return _folder_shape(folder, path)


def model_config(path: str) -> dict:
    """The content of the model's config.json: sizes, head counts, biases; of a GGUF file the same keys.

    Of a hub id that is not on this machine only config.json is downloaded. Raises ModelNotFound.
    """
    folder = local_folder(path)
    if folder is None and path.endswith(".gguf"):
        return _gguf_config(_existing(path))
    if folder is None:
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(path, "config.json")).parent
        except Exception as error:
            raise ModelNotFound(
                f"{path!r} is not on this machine and its config.json could not be fetched ({type(error).__name__}): "
                f"set model.path to a folder that holds it"
            ) from error
    _folder_shape(folder, path)  # raises if the model is not supported
    return json.loads((folder / "config.json").read_text())


def local_folder(path: str) -> Path | None:
    """The Hugging Face folder behind `path` if it is on this machine, else None (a hub id, a GGUF never run yet)."""
    if path.endswith(".gguf"):
        folder = converted_folder(_existing(path))
        return folder if folder.is_dir() else None
    if path.startswith("builtin:"):
        folder = BUILTIN / path.removeprefix("builtin:")
        if not folder.is_dir():
            names = ", ".join(sorted(p.name for p in BUILTIN.iterdir() if p.is_dir()))
            raise ModelNotFound(f"no built-in model {path!r}; there are: {names}")
        return folder
    if not _is_hub_id(path):
        return _existing(path)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def resolve(path: str) -> Path:
    """A local Hugging Face folder with safetensors: converts a GGUF file once, downloads a hub id.

    Raises ModelNotFound, with what to do, where there are no weights, or no network to fetch them.
    """
    if path.endswith(".gguf"):
        return _convert_gguf(_existing(path))
    folder = local_folder(path)
    if folder is not None and _is_whole(folder):
        return folder
    if _is_hub_id(path):
        return _download(path)
    raise ModelNotFound(
        f"{path!r} lacks weights in safetensors: load the model with transformers and save_pretrained it there"
    )


def _is_hub_id(path: str) -> bool:
    """Of the form owner/name, and no folder here."""
    return not path.startswith((".", "/", "~", "builtin:")) and path.count("/") == 1 and not Path(path).is_dir()


def _is_whole(folder: Path) -> bool:
    """All of its safetensors are there: a download may have been broken off between two shards."""
    try:
        return all(file.exists() for file in set(tensor_files(folder).values()))
    except ModelNotFound:
        return False


def _download(path: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(path, allow_patterns=PICKED))
        if not _is_whole(folder):  # offline the library returns what there is
            raise FileNotFoundError(f"weights in safetensors in {folder}")
        return folder
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the Hugging Face hub has no model {path!r}, or one that is not open to you: correct model.path, "
            f"or log in with `hf auth login`"
        ) from error
    except Exception as error:  # of requests, httpx or the hub's own kinds, by version
        raise ModelNotFound(
            f"{path!r} is not whole on this machine and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): where there is a network, unset HF_HUB_OFFLINE; where there is none, fetch it "
            f"elsewhere with `hf download {path}`, copy the folder here and set model.path to it"
        ) from error


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, read from the headers or the index."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {k: folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
    found = {name: file for file in sorted(folder.glob("*.safetensors")) for name in tensor_specs(file)[0]}
    if not found:
        raise ModelNotFound(f"{folder} holds no *.safetensors file")
    return found


def tensor_specs(file: Path) -> tuple[dict[str, dict], int]:
    """Name -> dtype, shape and data_offsets of a safetensors file's tensors, and where their data begins."""
    with file.open("rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        specs = json.loads(f.read(size))
    specs.pop("__metadata__", None)
    return specs, 8 + size


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Elements of every tensor of a checkpoint, from the safetensors headers."""
    files = set(tensor_files(folder).values())
    return {name: math.prod(spec["shape"]) for file in files for name, spec in tensor_specs(file)[0].items()}


def parameter_count(path: str) -> int:
    """Parameters of a whole model, a tied embedding once."""
    folder = resolve(path)
    sizes = tensor_sizes(folder)
    if model_shape(str(folder)).tied:
        sizes.pop("lm_head.weight", None)  # some checkpoints hold the tied embedding twice
    return sum(sizes.values())


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise ModelNotFound(f"no such model: {path!r} is not a folder, a .gguf file or a hub id of the form owner/name")
    return found


def _folder_shape(folder: Path, path: str) -> ModelShape:
    file = folder / "config.json"
    if not file.exists():
        raise ModelNotFound(f"{path!r} has no config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelNotFound(f"{path!r}: its config.json is not valid JSON: {error}") from None
    _check_family(config, path)
    missing = [key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in config]
    if missing:
        raise ModelNotFound(f"{path!r}: its config.json has no {', '.join(missing)}")
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        window=_window(config),
        chat=_has_chat_template(folder),
    )


def _check_family(config: dict, path: str) -> None:
    """Raises ModelNotFound, with the reason and what is supported, unless it is a plain stack of decoder layers."""
    kind, supported = config.get("model_type"), ", ".join(f"{name} ({kind})" for kind, name in FAMILIES.items())
    reasons = {
        "a mixture of experts": any(key in config for key in ("num_experts", "num_local_experts", "n_routed_experts")),
        "an encoder with a decoder": config.get("is_encoder_decoder", False),
        "not only text": "vision_config" in config or "audio_config" in config,
    }
    why = next((f", {reason}" for reason, holds in reasons.items() if holds), "")
    if kind not in FAMILIES or why:
        raise ModelNotFound(f"{path!r} is a {kind!r} model{why}; supported are {supported}")
    if quantized := config.get("quantization_config"):
        raise ModelNotFound(
            f"{path!r} is quantized ({quantized.get('quant_method', 'unknown')}) and cannot be trained: "
            f"set model.path to the model in float32, bfloat16 or float16"
        )
    others = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ModelNotFound(
            f"{path!r} has layers of {', '.join(sorted(others))}; supported are layers of full attention"
        )


def _window(config: dict) -> int | None:
    """Mistral slides if there is a number; Qwen has one and uses it only if told to; Llama never slides."""
    slides = {"llama": False, "mistral": True}.get(config["model_type"], config.get("use_sliding_window", False))
    return config.get("sliding_window") if slides else None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    file = folder / "tokenizer_config.json"
    try:
        return bool(file.exists() and json.loads(file.read_text()).get("chat_template"))
    except ValueError as error:
        raise ModelNotFound(f"{str(file)!r} is not valid JSON: {error}") from None


def _gguf_shape(file: Path) -> ModelShape:
    reader = gguf_reader(file)
    arch = reader.get_field("general.architecture").contents()
    _check_family({"model_type": arch}, str(file))
    names = {t.name for t in reader.tensors}
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    return ModelShape(
        hidden=int(reader.get_field(f"{arch}.embedding_length").contents()),
        layers=int(reader.get_field(f"{arch}.block_count").contents()),
        vocab=int(embedding.shape[1]),
        tied="output.weight" not in names,
        window=None,
        chat=reader.get_field("tokenizer.chat_template") is not None,
    )


def _gguf_config(file: Path) -> dict:
    shape, reader = _gguf_shape(file), gguf_reader(file)
    arch = reader.get_field("general.architecture").contents()

    def number(key: str, default: int | None = None) -> int | None:
        field = reader.get_field(f"{arch}.{key}")
        return default if field is None else int(field.contents())

    heads = number("attention.head_count")
    return {
        "model_type": arch,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length"),
    }


def gguf_reader(file: Path):
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
def _parsed(reader: Callable, file: Path, changed: int):
    """Reading a vocabulary takes seconds."""
    return reader(file)


def converted_folder(file: Path) -> Path:
    """Where a GGUF file's float32 safetensors are, or will be."""
    return cache_folder() / f"{file.stem}-{file.stat().st_size}"


def _convert_gguf(file: Path) -> Path:
    """Dequantise once into a folder of float32 safetensors, so that stages can read single layers of it."""
    from filelock import FileLock

    out = converted_folder(file)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock", timeout=1800):
        if not out.exists():
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

            # dequantize=True: else the weights stay packed and can be neither saved nor trained
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            partial = out.with_name(out.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
            partial.rename(out)
    return out
