"""The parameters of a model part in one flat buffer, read from safetensors a piece at a time.

No process holds more of the model than it computes with, not even while it loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from rl.lora import NO_LORA, factors_of, first_value, is_adapter, stored_name, with_added
from rl.lora_config import LoraConfig
from rl.model_shape import ModelNotFound
from rl.stored_weights import Stored, stored_tensors

PIECE = 1 << 22  # elements that are read from a checkpoint at a time


@dataclass(frozen=True)
class Named:
    """A parameter of a model part: its name in the whole model, and where it hangs."""

    full: str
    prefix: str
    module: nn.Module
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.module.get_parameter(self.name).shape)

    def put(self, parameter: nn.Parameter) -> None:
        *path, leaf = self.name.split(".")
        self.module.get_submodule(".".join(path)).register_parameter(leaf, parameter)


def slots_of(parts: list[tuple[str, nn.Module]]) -> list[Named]:
    """In the order of the parts."""
    return [
        Named(f"{prefix}{name}", prefix, part, name) for prefix, part in parts for name, _ in part.named_parameters()
    ]


def _read_into(held: Tensor, stored: Mapping[str, Stored], folder: Path, name: str) -> None:
    """A piece at a time."""
    if name not in stored:
        raise ModelNotFound(f"{folder} holds no tensor {name!r}")
    if stored[name].shape != tuple(held.shape):
        raise ModelNotFound(f"{folder}: {name} is {stored[name].shape}, its config.json makes it {tuple(held.shape)}")
    flat = held.view(-1)
    for start in range(0, len(flat), PIECE):
        stop = min(start + PIECE, len(flat))
        flat[start:stop].copy_(torch.from_numpy(stored[name].read(start, stop)))


class Weights:
    """All parameters of a model part that are trained, as one flat fp32 buffer, its gradient likewise.

    The parameters are views into it, so merging, clipping, Adam, digests and snapshots are each one
    operation on one tensor. With `dtype=bfloat16` the model computes in a bf16 copy and the fp32
    buffers are the masters. The last `numel - owned` entries repeat another stage's tied embedding.
    With adapters those alone are trained, and all other parameters are `frozen`, in `dtype`.
    """

    def __init__(
        self,
        parts: list[tuple[str, nn.Module]],
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        trainable: bool,
        owned_parts: int | None = None,
        lora: LoraConfig = NO_LORA,
    ):
        every = slots_of(parts)
        self.lora = lora
        slots = [slot for slot in every if is_adapter(slot.full) or not lora.rank]
        frozen = [slot for slot in every if not is_adapter(slot.full)] if lora.rank else []
        self.names = [slot.full for slot in slots]
        self.shapes = [slot.shape for slot in slots]
        sizes = [prod(shape) for shape in self.shapes]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.numel = self.offsets[-1]
        owned_prefixes = {prefix for prefix, _ in parts[:owned_parts]}
        self.owned = sum(n for n, slot in zip(sizes, slots) if slot.prefix in owned_prefixes)

        self.master = torch.empty(self.numel, dtype=torch.float32, device=device)
        self.compute = self.master if dtype == torch.float32 else torch.empty(self.numel, dtype=dtype, device=device)
        self.grad = torch.zeros_like(self.master) if trainable else self.master.new_zeros(0)  # of what is only read
        self._compute_grad = torch.zeros_like(self.compute) if trainable and dtype != torch.float32 else self.grad
        self.frozen: dict[str, Tensor] = {}
        self._read(folder, slots, frozen, dtype)
        self._bind(slots, trainable)

    def _bind(self, slots: list[Named], trainable: bool) -> None:
        for i, slot in enumerate(slots):
            parameter = nn.Parameter(self.view(i, self.compute), requires_grad=trainable)
            if trainable:
                parameter.grad = self.view(i, self._compute_grad)
            slot.put(parameter)

    def _read(self, folder: Path, slots: list[Named], frozen: list[Named], dtype: torch.dtype) -> None:
        """Into masters and frozen parameters. Raises ModelNotFound if a tensor is missing or has another shape."""
        stored = stored_tensors(folder)
        for i, slot in enumerate(slots):
            if self.lora.rank:
                self.view(i, self.master).copy_(first_value(slot.full, slot.shape))
            else:
                _read_into(self.view(i, self.master), stored, folder, slot.full)
        for slot in frozen:
            held = torch.empty(slot.shape, dtype=dtype, device=self.master.device)
            _read_into(held, stored, folder, stored_name(slot.full))
            slot.put(nn.Parameter(held, requires_grad=False))
            self.frozen[slot.full] = held
        self.publish()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter that a model without adapters has, by the checkpoint's names; what adapters add is in it."""
        if not self.lora.rank:
            yield from ((name, self.view(i, self.compute)) for i, name in enumerate(self.names))
        for name, held in self.frozen.items():
            a_and_b = factors_of(name)
            yield stored_name(name), held if a_and_b is None else self._merged(held, *a_and_b)

    def _merged(self, held: Tensor, a: str, b: str) -> Tensor:
        right, left = (self.view(self.names.index(name), self.master) for name in (a, b))
        return with_added(held, right, left, self.lora)

    def view(self, i: int, flat: Tensor) -> Tensor:
        """Parameter i inside `flat`."""
        return flat[self.offsets[i] : self.offsets[i + 1]].view(self.shapes[i])

    def slice_of(self, name: str) -> slice:
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i + 1])

    def publish(self) -> None:
        """Copy the masters into the compute weights; nothing to do in fp32."""
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def collect(self) -> None:
        """Add the compute gradients of a microbatch to the fp32 ones; in fp32 autograd already did."""
        if self._compute_grad is not self.grad:
            self.grad.add_(self._compute_grad)
            self._compute_grad.zero_()
