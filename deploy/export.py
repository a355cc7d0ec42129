"""`northstar export`: the policy of a run's checkpoint as an ordinary Hugging Face folder, or as a peft adapter. No Ray.

    rank-d0p0 ─▶ weights [owned]                  model-00001-of-0000n.safetensors
    rank-d0p1 ─▶ weights [owned | tied copy] ─▶    …                 + index, config, tokenizer
    adapters alone:                               adapter_model.safetensors + adapter_config.json

Stages hold the model's parameters one after the other, so a tensor is a slice of one stage's masters; no more
than one shard of them is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl.config import ModelConfig
from rl.lora import merged, peft_config, peft_name
from rl.lora_config import LoraConfig
from rl.model_files import resolve
from rl.policy import EMBEDDING, HEAD, adapters, layout
from rl.stops import ends_named, stop_tokens
from swarm import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD = 5 * 10**9  # bytes of one file, as the hub has them
WEIGHTS = (".safetensors", ".safetensors.index.json")


class ExportError(ValueError):
    """A run that cannot be exported, or a place where an export cannot go."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    step: int
    parameters: int
    dtype: str
    damaged: tuple[str, ...]  # what is wrong with newer checkpoints


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: `size` elements from `start` on in the masters of stage `stage`."""

    stage: int
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def export_policy(
    run: Path, out: Path, step: int | None = None, dtype: str | None = None, merge: bool = False
) -> Exported:
    """Write the newest checkpoint of `run`, or that of `step`, to the new folder `out`.

    The folder appears under its name when it is whole. `dtype` is the model's unless given; in float32 the
    weights are the masters, bit for bit. Adapters are written alone, or with `merge` the whole model with what they add.
    Raises ExportError, CheckpointError or ModelNotFound.
    """
    model = _model_of(run)
    if merge and not model.lora.rank:
        raise ExportError(f"{run} trained all weights and has no adapters to merge: leave out --merge")
    if out.exists():
        raise ExportError(f"{out} is already there: export to a folder that is not, or remove it first")
    saved, damaged = checkpoint.newest_good(run) if step is None else (checkpoint.at_step(run, step), [])
    base, dtype = resolve(model.path), dtype or model.dtype
    half = out.with_name(out.name + ".partial")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        with _trained(saved, base, model.lora) as trained:
            if model.lora.rank and not merge:
                parameters = _write_adapters(trained, model, half, DTYPES[dtype])
            else:
                parameters = _write_weights(trained, base, model.lora, half, DTYPES[dtype])
                _write_metadata(base, half, dtype)
        half.rename(out)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return Exported(out, checkpoint.read_state(saved)["step"], parameters, dtype, tuple(damaged))


def _model_of(run: Path) -> ModelConfig:
    """The model section alone: the task's data need not be on this machine any more."""
    file = run / "config.toml"
    if not file.is_file():
        raise ExportError(f"{run} is no run folder: it has no config.toml")
    try:
        return ModelConfig.model_validate(tomllib.loads(file.read_text()).get("model", {}))
    except ValueError as error:
        raise ExportError(f"{file}: {error}") from error


Trained = Mapping[str, Callable[[], Tensor]]  # name: its fp32 master, read when it is asked for


@contextmanager
def _trained(saved: Path, base: Path, lora: LoraConfig) -> Generator[Trained]:
    """What the checkpoint holds, in the order of the stages."""
    with ExitStack() as stack:
        masters = [stack.enter_context(safe_open(file, framework="pt")).get_slice("weights") for file in _stages(saved)]
        shapes = adapters(base, lora) if lora.rank else layout(base)
        slots = _slots(shapes, [flat.get_shape()[0] for flat in masters], saved)
        yield {name: partial(_read, masters, slot) for name, slot in slots}


def _read(masters: list[Any], slot: Slot) -> Tensor:
    return masters[slot.stage][slot.start : slot.start + slot.size].view(slot.shape)


def _write_weights(trained: Trained, base: Path, lora: LoraConfig, out: Path, dtype: torch.dtype) -> int:
    """Shards and their index; returns the number of parameters."""
    shapes = layout(base)
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: prod(shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD,
    )
    read = merged(trained, base, lora) if lora.rank else lambda name: trained[name]()
    for name, tensors in split.filename_to_tensors.items():
        shard = {tensor: read(tensor).to(dtype) for tensor in tensors}
        save_file(shard, out / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return sum(map(prod, shapes.values()))


def _write_adapters(trained: Trained, model: ModelConfig, out: Path, dtype: torch.dtype) -> int:
    """As peft saves them."""
    found = {peft_name(name): read().to(dtype) for name, read in trained.items()}
    save_file(found, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_config(model.lora)
    config.base_model_name_or_path, config.inference_mode = model.path, True
    config.save_pretrained(str(out))
    return sum(tensor.numel() for tensor in found.values())


def _stages(saved: Path) -> list[Path]:
    """The files of the first replica, in the order of the pipeline; all replicas hold the same."""
    return [checkpoint.rank_file(saved, 0, p) for p in range(len(list(saved.glob("rank-d0p*.safetensors"))))]


def _slots(shapes: dict[str, tuple[int, ...]], sizes: list[int], saved: Path) -> Iterator[tuple[str, Slot]]:
    """Deal the tensors, in their order, over stages of `sizes` elements; a tied copy at the end is left out."""
    total = sum(prod(shape) for shape in shapes.values())
    copies = prod(shapes[EMBEDDING]) if len(sizes) > 1 and EMBEDDING in shapes and HEAD not in shapes else 0
    if sum(sizes) != total + copies:
        raise ExportError(
            f"{saved} holds {sum(sizes) - copies} parameters and the model of the run {total}: "
            f"model.path names another model than when it ran"
        )
    stage = start = 0
    for name, shape in shapes.items():
        if start == sizes[stage]:
            stage, start = stage + 1, 0
        if start + prod(shape) > sizes[stage]:
            raise ExportError(f"{saved}: {name} is cut in two between stages {stage} and {stage + 1}")
        yield name, Slot(stage, start, shape)
        start += prod(shape)


def _write_metadata(base: Path, out: Path, dtype: str) -> None:
    """config.json with the new dtype; tokenizer, generation config and the rest as the base model has them."""
    kept = (".json", ".jinja", ".model", ".txt")
    for file in base.iterdir():
        if file.suffix in kept and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, out / file.name)
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype  # the key's name, by transformers' version
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_ends(base, out)


def _write_ends(base: Path, out: Path) -> None:
    """Whatever generates with the exported model ends its answers where the run did."""
    file, ends = out / "generation_config.json", stop_tokens(base)
    generation = json.loads((file if file.exists() else out / "config.json").read_text())
    if ends_named(generation) != set(ends):
        generation = generation if file.exists() else {}
        file.write_text(json.dumps(generation | {"eos_token_id": ends}, indent=2) + "\n")
