"""Low-rank adapters beside frozen weights: W x + alpha/rank · B A x, with A [rank, in] and B [out, rank].

References: Hu et al. 2021, "LoRA", arXiv:2106.09685. The layers are peft's; where their numbers lie is ours (`rl.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from rl.lora_config import LoraConfig
from rl.stored_weights import stored_tensors

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig

NO_LORA = LoraConfig()
ADAPTER = "default"  # peft's name for the only one
_FACTORS = tuple(f".lora_{factor}.{ADAPTER}.weight" for factor in "AB")
_BASE = ".base_layer."


def peft_config(lora: LoraConfig) -> PeftConfig:
    from peft import LoraConfig as PeftConfig  # two seconds that runs without adapters do not need

    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] -- any number will do
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def adapt(model: nn.Module, lora: LoraConfig) -> None:
    """Put adapters beside the layers that `lora` names, on the meta device."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(lora), model, adapter_name=ADAPTER, low_cpu_mem_usage=True)


def is_adapter(name: str) -> bool:
    return name.endswith(_FACTORS)


def stored_name(name: str) -> str:
    """What the checkpoint calls a frozen parameter."""
    return name.replace(_BASE, ".")


def peft_name(name: str) -> str:
    """What peft calls an adapter's parameter in its own files."""
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


def factors_of(name: str) -> tuple[str, str] | None:
    """A and B of a frozen parameter that has them."""
    if not name.endswith(f"{_BASE}weight"):
        return None
    layer = name.removesuffix(f"{_BASE}weight")
    a, b = _FACTORS
    return layer + a, layer + b


def with_added(held: Tensor, a: Tensor, b: Tensor, lora: LoraConfig) -> Tensor:
    """A frozen weight [out, in] and what its adapter adds, in fp32 before it is rounded to the weight's dtype."""
    return (held.float() + lora.alpha / lora.rank * (b @ a)).to(held.dtype)


def merged(trained: Mapping[str, Callable[[], Tensor]], folder: Path, lora: LoraConfig) -> Callable[[str], Tensor]:
    """Parameters of the checkpoint in `folder` by their names, fp32, with what adapters add; `trained`: these, by name."""
    stored = stored_tensors(folder)

    def read(name: str) -> Tensor:
        held = torch.from_numpy(stored[name].read(0, stored[name].size)).view(stored[name].shape)
        a, b = (name.removesuffix(".weight") + factor for factor in _FACTORS)
        return with_added(held, trained[a](), trained[b](), lora) if a in trained else held

    return read


def first_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """fp32 before the first tick: B is 0 and A is uniform within 1/√in, as peft draws it, here a function of its name.

    So whoever holds adapters begins with the same, and nobody sends them.
    """
    if name.endswith(_FACTORS[1]):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    rng = np.random.Generator(np.random.Philox(xxhash.xxh3_64_intdigest(name)))
    return torch.from_numpy(rng.uniform(-bound, bound, shape).astype(np.float32))
