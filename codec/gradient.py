"""How the gradients of replicas are summed: dense, or coded with error feedback. Kinds are in GRADIENT_SUMS.

Two copies of a tied embedding, on the first and the last stage, are replicas too: of one matrix. A kind of one's own is a function
`(config, shapes, replicas, seed, device) -> GradientSum`, named as codec.gradient.kind = "package.module:function"; with an
attribute `cost`, as codec/costs.py has it, `plan` and `simulate` know what it sends.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Protocol, cast

import torch
from torch import Tensor

from codec.coded_sum import Replicas, coded_sum
from codec.config import GradientConfig
from codec.named import imported
from codec.powersgd_sum import PowerSGDSum
from codec.vector import EntropyVector, SignVector, VectorCoder

Shapes = list[tuple[int, ...]]


class GradientSum(Protocol):
    """A sum over replicas, in place, with a state of its own."""

    def __call__(self, grad: Tensor) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


class DenseSum:
    """No compression: one sum of the flat gradient."""

    def __init__(self, replicas: Replicas):
        self.replicas = replicas

    def __call__(self, grad: Tensor) -> None:
        self.replicas.sum(grad, grad.nbytes)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None: ...


class CodedSum:
    """Every value coded, and what is lost added to the next tick's gradient."""

    def __init__(self, coder: VectorCoder, n: int, replicas: Replicas, device: torch.device):
        self.coder, self.replicas = coder, replicas
        self.error = torch.zeros(n, device=device)

    def __call__(self, grad: Tensor) -> None:
        """Replace the flat gradient [n] by the sum as all replicas hold it."""
        self.error += grad
        total, self.error = coded_sum(self.error, self.coder, self.replicas, grad.nbytes)
        grad.copy_(total)

    def state(self) -> dict[str, Tensor]:
        return {"error": self.error}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.error.copy_(state["error"])


Maker = Callable[[GradientConfig, Shapes, Replicas, int, torch.device], GradientSum]


def _dense(config: GradientConfig, shapes: Shapes, replicas: Replicas, seed: int, device: torch.device) -> GradientSum:
    return DenseSum(replicas)


def _powersgd(
    config: GradientConfig, shapes: Shapes, replicas: Replicas, seed: int, device: torch.device
) -> GradientSum:
    coder = None if config.bits is None else EntropyVector(config.bits)
    return PowerSGDSum(shapes, config.rank, replicas, seed, device, coder)


def _sign(config: GradientConfig, shapes: Shapes, replicas: Replicas, seed: int, device: torch.device) -> GradientSum:
    return CodedSum(SignVector(), sum(map(prod, shapes)), replicas, device)


def _sparse(config: GradientConfig, shapes: Shapes, replicas: Replicas, seed: int, device: torch.device) -> GradientSum:
    assert config.bits is not None  # the config asks for it
    return CodedSum(EntropyVector(config.bits), sum(map(prod, shapes)), replicas, device)


GRADIENT_SUMS: dict[str, Maker] = {"none": _dense, "powersgd": _powersgd, "sign": _sign, "sparse": _sparse}


def gradient_sum(
    config: GradientConfig, shapes: Shapes, replicas: Replicas, seed: int, device: torch.device
) -> GradientSum:
    """What `codec.gradient.kind` names, for parameters of these shapes in the order they lie in the flat gradient.

    Of one replica there is nothing to sum. Raises ValueError for a kind that cannot be imported.
    """
    if replicas.count == 1:
        return DenseSum(replicas)
    return gradient_maker(config)(config, shapes, replicas, seed, device)


def gradient_maker(config: GradientConfig) -> Maker:
    """What `codec.gradient.kind` names. Raises ValueError if it cannot be imported."""
    if config.kind in GRADIENT_SUMS:
        return GRADIENT_SUMS[config.kind]
    return cast(Maker, imported(config.kind, "codec.gradient.kind"))
