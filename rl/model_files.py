"""Where a model's files are and what shape it has. No torch: used before anything heavy starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypedDict, cast

from rl.config import ModelConfig
from rl.gguf_files import convert, converted_folder, gguf_config, gguf_shape
from rl.model_shape import ModelNotFound, ModelShape, shape_of

BUILTIN = Path(__file__).parent / "builtin"
PICKED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what a run needs of a model on the hub


class TensorSpec(TypedDict):
    """A tensor in the header of a safetensors file; offsets count from where the file's data begin."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def model_shape(path: str) -> ModelShape | None:
    """Shape from the model's own metadata; None for a hub id that is not on this machine yet.

    Raises ModelNotFound if a local path does not exist or holds no supported model.
    """
    folder = local_folder(path)
    if folder is None:
        return gguf_shape(_existing(path)) if path.endswith(".gguf") else None
    return folder_shape(folder, path)


def folder_shape(folder: Path, path: str | None = None) -> ModelShape:
    """`path` is what a user calls it. Raises ModelNotFound if it holds no supported model."""
    name = str(folder) if path is None else path
    return shape_of(_folder_config(folder, name), name, _has_chat_template(folder))


def model_config(path: str) -> dict[str, Any]:
    """The content of the model's config.json: sizes, head counts, biases; of a GGUF file the same keys.

    Of a hub id that is not on this machine only config.json is downloaded. Raises ModelNotFound.
    """
    folder = local_folder(path)
    if folder is None and path.endswith(".gguf"):
        return gguf_config(_existing(path))
    if folder is None:
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(path, "config.json")).parent
        except Exception as error:
            raise ModelNotFound(
                f"{path!r} is not on this machine and its config.json could not be fetched ({type(error).__name__}): "
                f"set model.path to a folder that holds it"
            ) from error
    config = _folder_config(folder, path)
    shape_of(config, path, chat=False)  # raises if the model is not supported
    return config


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
        return convert(_existing(path))
    folder = local_folder(path)
    if folder is not None and is_whole(folder):
        return folder
    if _is_hub_id(path):
        return _download(path)
    raise ModelNotFound(
        f"{path!r} lacks weights in safetensors: load the model with transformers and save_pretrained it there"
    )


def _is_hub_id(path: str) -> bool:
    """Of the form owner/name, and no folder here."""
    return not path.startswith((".", "/", "~", "builtin:")) and path.count("/") == 1 and not Path(path).is_dir()


def is_whole(folder: Path) -> bool:
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
        if not is_whole(folder):  # offline the library returns what there is
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
        found = {k: folder / v for k, v in _parsed(index.read_bytes(), index).get("weight_map", {}).items()}
    else:
        found = {name: file for file in sorted(folder.glob("*.safetensors")) for name in tensor_specs(file)[0]}
    if not found:
        raise ModelNotFound(f"{folder} holds no *.safetensors file, or names none in {index.name}")
    return found


def tensor_specs(file: Path) -> tuple[dict[str, TensorSpec], int]:
    """By name those of a safetensors file, and where their data begin. Raises ModelNotFound if it is none, or cut."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if 8 + size > file.stat().st_size:
            raise ModelNotFound(f"{file} is no whole safetensors file (a git-lfs pointer?): fetch it again")
        specs = _parsed(f.read(size), file)
    specs.pop("__metadata__", None)
    return specs, 8 + size


def _parsed(text: str | bytes, file: Path) -> dict[str, Any]:
    """Of a JSON object. Raises ModelNotFound."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return cast(dict[str, Any], found)
    except ValueError as error:
        raise ModelNotFound(f"{file} cannot be read ({error}): fetch it again") from error


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a checkpoint, from the safetensors headers."""
    files = set(tensor_files(folder).values())
    return {name: tuple(spec["shape"]) for file in files for name, spec in tensor_specs(file)[0].items()}


def trained_count(model: ModelConfig) -> int:
    """Parameters that are trained: a whole model's, a tied embedding once, or its adapters'."""
    folder, lora = resolve(model.path), model.lora
    if lora.rank:
        layers = tuple(f".{target}.weight" for target in lora.targets)
        return sum(lora.rank * sum(shape) for name, shape in tensor_shapes(folder).items() if name.endswith(layers))
    shapes = tensor_shapes(folder)
    if folder_shape(folder).tied:
        shapes.pop("lm_head.weight", None)  # some checkpoints hold the tied embedding twice
    return sum(map(math.prod, shapes.values()))


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise ModelNotFound(f"no such model: {path!r} is not a folder, a .gguf file or a hub id of the form owner/name")
    return found


def _folder_config(folder: Path, path: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ModelNotFound(f"{path!r} has no config.json")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ModelNotFound(f"{path!r}: its config.json is not valid JSON: {error}") from None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    file = folder / "tokenizer_config.json"
    try:
        return bool(file.exists() and json.loads(file.read_text()).get("chat_template"))
    except ValueError as error:
        raise ModelNotFound(f"{str(file)!r} is not valid JSON: {error}") from None
