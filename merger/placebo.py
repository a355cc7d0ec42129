"""Placebos: what a run merges in the place of M̄ to learn whether the anchor's gradient was what helped.

Both are refreshed and held on the anchor's schedule, so dose, delay and cadence are equal; both are functions
of what every replica has, so ranks need no message to agree. No anchor runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from codec.state import under

if TYPE_CHECKING:
    from torch import Tensor


class OwnAverage:
    """The average that the anchor would keep, of G_comp instead of M: same weights, same batches, with the codec.

    M̄ ← β·M̄ + (1-β)·G_comp(source) at each fire, G_comp(source) at the first.
    """

    def __init__(self, beta: float, seed: int, sizes: dict[str, int]):
        self.beta = beta
        self.average: Tensor | None = None
        self.sources: dict[int, Tensor] = {}

    def keep(self, source: int, g_comp: Tensor) -> None:
        """G_comp of the tick that starts from the weights after `source` ticks, for a fire to come."""
        self.sources[source] = g_comp.clone()

    def fire(self, source: int, g_comp: Tensor) -> tuple[Tensor, Tensor] | None:
        """Signs of the average with the gradient of `source` in it, and of that gradient alone, int8 [n] each."""
        g = self.sources.pop(source, None)
        if g is None:
            return None
        alone = g.sign().char()
        self.average = g if self.average is None else self.average.lerp_(g, 1 - self.beta)
        return self.average.sign().char(), alone

    def state(self) -> dict[str, Tensor]:
        held = {} if self.average is None else {"average": self.average}
        return held | {f"source.{s}": g for s, g in self.sources.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.average = state.get("average")
        self.sources = {int(source): g for source, g in under("source", state).items()}


class RandomSigns:
    """Fair coins at each fire, one a parameter: drawn by the parameter's name, so that they do not depend on the
    layout and both copies of a tied embedding get the same."""

    def __init__(self, beta: float, seed: int, sizes: dict[str, int]):
        self.seed, self.sizes = seed, sizes

    def keep(self, source: int, g_comp: Tensor) -> None: ...

    def fire(self, source: int, g_comp: Tensor) -> tuple[Tensor, Tensor]:
        """Signs, int8 [n], of the parameters in the order of `sizes`; an average and a gradient are the same here."""
        coins = [self._coins(source, name, count) for name, count in self.sizes.items()]
        signs = g_comp.new_tensor(np.concatenate(coins)).char()
        return signs, signs

    def _coins(self, source: int, name: str, count: int) -> np.ndarray:
        key = np.random.SeedSequence([self.seed, 0x51D, source, zlib.crc32(name.encode())])
        bits = np.random.Generator(np.random.Philox(key)).integers(0, 2, count, dtype=np.int8)
        return 2 * bits - 1

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None: ...


class Placebo(Protocol):
    """What stands in for the anchor."""

    def keep(self, source: int, g_comp: Tensor) -> None: ...

    def fire(self, source: int, g_comp: Tensor) -> tuple[Tensor, Tensor] | None:
        """What takes the place of sign(M̄), and of sign(M); None if the tick of `source` was skipped."""
        ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


PLACEBOS: dict[str, Callable[[float, int, dict[str, int]], Placebo]] = {"own": OwnAverage, "random": RandomSigns}
