"""The face of a merger: (G_comp, correction, age) -> G, elementwise on flat fp32 gradients, the same on every rank.

    correction held ─▶ prepare: this tick's dose, from the whole stage ─▶ apply: G, block by block

Ours are written in operators (`d = abs(g); d *= …`), so they take NumPy arrays as they take tensors, and give the same
bits: `northstar plan` walks a model's weights through the run's own merger, without torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from merger.holds import Holds
from merger.settings import MergerSettings

if TYPE_CHECKING:
    from jaxtyping import Float32, Shaped
    from torch import Tensor

    Gradient = Float32[Tensor, " n"]  # of a rank's n parameters
    Held = Shaped[Tensor, " n"]  # what it merges: M̄ or its sign in int8, or δ

Payload = Literal["sign", "dense"]
Norm = Callable[["Tensor"], float]
Total = Callable[[list[float]], list[float]]  # sums of numbers over the stages of a replica


@dataclass(frozen=True)
class MergerCost:
    """What a merger costs a rank, beside the correction (`payload`) and the gradients of source ticks (`needs_source`)."""

    state: float = 0.0  # bytes that it keeps from tick to tick
    norms: int = 0  # that all stages sum up each time it merges
    learns: int = 0  # numbers that they sum up at each fire


def local_norm(x: Tensor) -> float:
    """‖x‖ of a tensor that is all there is; a swarm passes one that sums over its stages."""
    return x.double().norm().item()


class Merger(Protocol):
    """Merges what the anchor published. One writes `payload`, `prepare` and `apply`, and inherits what it does not need:

    class Half(Merger):
        payload = "sign"

        def prepare(self, g_comp, correction, age, norm=local_norm):
            self.dose = 0.5 * self.config.dose

        def apply(self, g_comp, correction):
            return g_comp + self.dose * abs(g_comp) * correction.sign()
    """

    payload: ClassVar[Payload | None]  # what the anchor must publish for it; None: nothing, it never merges
    needs_source: ClassVar[bool] = False  # whether the correction held is M̄ - G_comp(source), of a dense M̄
    looks: ClassVar[bool] = False  # whether it is shown gradients at the coordinates of `merger.look`
    config: MergerSettings
    dose: float  # of the last `prepare`
    holds: Holds  # how long corrections have been held; whoever holds them counts
    # who holds corrections says so:
    windows: bool = False  # whether an M has samples of all ticks since the last fire
    replayed: float = 1.0  # how many samples it has, as a share of a tick's

    def __init__(self, config: MergerSettings):
        self.config = config
        self.dose = 0.0
        self.holds = Holds()

    @classmethod
    def cost(cls, config: MergerSettings, n: int) -> MergerCost:
        """For a rank that holds `n` parameters."""
        return MergerCost()

    @classmethod
    def has_effect(cls, config: MergerSettings) -> bool:
        """Whether a correction can change a gradient. If not, none is computed or sent."""
        return True

    @abstractmethod
    def prepare(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> None:
        """Look at this tick's whole gradient and set the dose. `age`: ticks since the first merge of the correction."""

    @abstractmethod
    def apply(self, g_comp: Gradient, correction: Held) -> Gradient:
        """The merged gradient of all parameters, or of any block of them; neither argument is written to."""
        ...

    def watch(self, g_comp: Tensor, source: int | None) -> None:
        """In each tick, if it `looks`: G_comp before it is merged. `source`: if a fire starts here."""

    def learn(self, source: int, m: Tensor, total: Total) -> None:
        """At each fire, if it `looks`: signs of M alone, int8, of the fire that started at `source`."""

    def wants(self) -> bool:
        """After `learn`: whether the correction of that fire can change a gradient while it is held. If not, it is not sent."""
        return True

    @classmethod
    def capped(cls, config: MergerSettings, holds: Holds) -> float | None:
        """The share of a step that the settings ask for, if they also keep it to less in such a hold."""
        return None

    def metrics(self) -> dict[str, float]:
        """Of the last `prepare`, for the record of a tick."""
        return {}

    def __call__(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> Gradient:
        """Both at once, of a gradient that is all there is."""
        self.prepare(g_comp, correction, age, norm)
        return self.apply(g_comp, correction)

    def state(self) -> dict[str, Tensor]:
        """All that changes from tick to tick, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()`, bit for bit."""


def towards_signs(g_comp: Gradient, correction: Held) -> Gradient:
    """|G_comp|·sign(M̄) - G_comp, in one new tensor."""
    d = abs(g_comp)
    d *= sign(correction)
    d -= g_comp
    return d


def sign(x: Held) -> Held:
    """-1, 0 or 1, of a tensor or of a NumPy array, which has no such method."""
    return np.sign(x) if isinstance(x, np.ndarray) else x.sign()  # pyright: ignore[reportReturnType]
