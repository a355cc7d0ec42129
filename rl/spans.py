"""Which decoder layers a stage of the pipeline has. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Decoder layers [lo, hi) of `total`."""

    lo: int
    hi: int
    total: int

    @property
    def first(self) -> bool:
        return self.lo == 0

    @property
    def last(self) -> bool:
        return self.hi == self.total


def spans(layers: int, boundaries: Sequence[int], stages: int) -> list[Span]:
    """Cut at `boundaries`, then deal the len(boundaries)+1 segments evenly over `stages`."""
    cuts = [0, *boundaries, layers]
    each = (len(cuts) - 1) // stages
    return [Span(cuts[p * each], cuts[(p + 1) * each], layers) for p in range(stages)]
