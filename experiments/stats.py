"""What several seeds allow one to say: means with intervals, differences seed by seed, effects, gates, ignition.

Pure functions of numbers. Intervals are 95 % Student intervals over seeds; nothing is called a difference while its
interval holds 0, nor over fewer than three seeds: accuracies are multiples of 1/prompts, and two that agree by
chance would make an interval of no width. Seeds pair runs: one seed has
the same prompts and the same random numbers in every cell, so differences are taken within a seed first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

CONFIDENCE = 0.95
LEAST_SEEDS = 3  # for any claim
Seeds = Mapping[str, float]  # a value by seed


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its interval; NaN where there are too few seeds to say."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def distinguishable(self) -> bool:
        """From 0. Over too few seeds, never."""
        return self.n >= LEAST_SEEDS and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student interval: half = t(0.975, n-1) · s / √n with the unbiased deviation s."""
    n = len(values)
    if n < 2:
        return Estimate(float(values[0]) if n else math.nan, math.nan, n)
    t = special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)  # Student's quantile; scipy.stats takes a second to import
    return Estimate(float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n)), n)


def paired(a: Seeds, b: Seeds) -> Estimate:
    """a - b over the seeds that both have."""
    return estimate([a[seed] - b[seed] for seed in a if seed in b])


@dataclass(frozen=True)
class Effects:
    """Of two factors, from the four cells neither, first, second, both."""

    first: Estimate
    second: Estimate
    interaction: Estimate


def factorial(neither: Seeds, first: Seeds, second: Seeds, both: Seeds) -> Effects:
    """Main effects and interaction, each a contrast within a seed, over the seeds that all four cells have.

    A main effect is what raising that factor changes, averaged over the levels of the other; the
    interaction is how much more raising the first changes where the second is raised too.
    """
    seeds = [s for s in neither if s in first and s in second and s in both]
    cells = [(neither[s], first[s], second[s], both[s]) for s in seeds]
    return Effects(
        estimate([((f - n) + (b - s)) / 2 for n, f, s, b in cells]),
        estimate([((s - n) + (b - f)) / 2 for n, f, s, b in cells]),
        estimate([(b - s) - (f - n) for n, f, s, b in cells]),
    )


@dataclass(frozen=True)
class Gate:
    """A limit on a mean, and what the interval over seeds says of it."""

    found: Estimate
    limit: float

    @property
    def passed(self) -> bool:
        """By the mean."""
        return self.found.mean <= self.limit

    @property
    def certain(self) -> bool:
        """Whether the whole interval is on that side; over too few seeds, never."""
        beyond = self.found.high <= self.limit or self.found.low > self.limit
        return self.found.n >= LEAST_SEEDS and beyond


def near_base(base: Seeds, cell: Seeds, drop: float) -> Gate:
    """ "Remains near base": validation accuracy drops by at most `drop` against the base."""
    return Gate(paired(base, cell), drop)


def above_floor(cell: Seeds, floor: Seeds) -> Gate:
    """The cell is above the floor: floor - cell is at most 0."""
    return Gate(paired(floor, cell), 0.0)


# --- ignition --------------------------------------------------------------------------------------

EARLY = 0.2  # share of a run that is its baseline, at least 5 points
RISE, SPREADS = 0.25, 4.0  # what leaving it means: by a quarter, and by four of its own spreads
WINDOW = 5  # points of the running median; a rise must also last as long
TOGETHER = 2  # steps that a running median can be off


def ignition(curve: Mapping[float, float]) -> float | None:
    """The first step from which a series stays above its own early baseline to the end of the run; None if never.

    The baseline is the median m of the first fifth of the run, its spread s = 1.4826 · MAD. The series,
    as a centred running median of 5 points, has left it while it is above m + max(4·s, |m|/4). One excursion
    that returns is no ignition, and neither is a fall: length and entropy run away upwards.
    """
    points = [(step, value) for step, value in sorted(curve.items()) if math.isfinite(value)]
    early = max(5, round(EARLY * len(points)))
    if len(points) < early + WINDOW:
        return None
    steps, values = zip(*points)
    head = np.array(values[:early])
    middle = float(np.median(head))
    spread = 1.4826 * float(np.median(np.abs(head - middle)))
    limit = middle + max(SPREADS * spread, RISE * abs(middle))
    half = WINDOW // 2
    smooth = [float(np.median(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
    inside = [i for i, value in enumerate(smooth) if value <= limit]
    first = inside[-1] + 1 if inside else 0
    return steps[first] if len(values) - first >= WINDOW else None


def leader(length: float | None, entropy: float | None) -> str | None:
    """Which of two ignitions came first; None where neither came."""
    if length is None and entropy is None:
        return None
    a, b = (math.inf if step is None else step for step in (length, entropy))
    return "together" if abs(a - b) <= TOGETHER else "length" if a < b else "entropy"
