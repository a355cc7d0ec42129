"""Low-rank adapters beside frozen weights: W x + alpha/rank · B A x, with A [rank, in] and B [out, rank].

References: Hu et al. 2021, "LoRA", arXiv:2106.09685. The layers are peft's; where their numbers lie is ours (`rl.weights`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from rl.config import LoraConfig

NO_LORA = LoraConfig()
ADAPTER = "default"  # peft's name for the only one
_FACTORS = tuple(f".lora_{factor}.{ADAPTER}.weight" for factor in "AB")
_BASE = ".base_layer."


def adapt(model: nn.Module, lora: LoraConfig) -> None:
    """Put adapters beside the layers that `lora` names, on the meta device."""
    from peft import LoraConfig as PeftConfig  # two seconds that runs without adapters do not need
    from peft import inject_adapter_in_model

    wanted = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none")
    inject_adapter_in_model(wanted, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)


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


def first_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """fp32 before the first tick: B is 0 and A is uniform within 1/√in, as peft draws it, here a function of its name.

    So whoever holds adapters begins with the same, and nobody sends them.
    """
    if name.endswith(_FACTORS[1]):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    rng = np.random.Generator(np.random.Philox(xxhash.xxh3_64_intdigest(name)))
    return torch.from_numpy(rng.uniform(-bound, bound, shape).astype(np.float32))
