"""What both ends of a link expect of the next symbols: integer counts, learnt from the symbols before.

A symbol is a magnitude |q| in steps. Rows differ in energy and coefficients in deviation, so

    expected |q| of coefficient i in row n  =  share of i (from its deviation) · energy of row n (sent)

and this, in half octaves, is the symbol's class. Every class has one histogram. As a class is a scale
relative to the step, histograms stay good when the step or the basis changes. At boundary 15 of SmolLM2 the
energies save 2 to 3 % of the bytes of hidden states and 17 to 25 % of those of gradients. Learning the shares
too was tried and left out: 1 % worse on the rows that the deviations are of, 1 to 2 % better on other tasks.

Both ends must agree to the last bit, on different machines too: counts are integers, and whatever is
derived from them uses only + - * / and sqrt, which IEEE 754 rounds exactly. No exp, no log.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import fsum, sqrt

import numpy as np
import torch
import xxhash
from torch import Tensor

from codec.transform.symbols import DIRECT, SYMBOLS

CLASSES = 44  # half octaves of the expected |q|
_LOWEST = -20  # class 0 expects 2^(-20/2) or less
_FINE = 4  # shares are measured so much finer than classes, in eighths of an octave
ENERGIES = 64  # class of a row: 0 for a row of zeros, then half octaves of Σ|q| from 1

_SEEN = 64  # what one symbol adds to its count; the 1 that every count starts with is then nearly nothing
_PRIOR = 128  # a fresh histogram weighs as much as so many symbols
_FORGET = 1 << 20  # a histogram is halved when it holds more: 16 thousand symbols


def _powers(root: float, count: int) -> np.ndarray:
    """root^0, root^1, … by multiplication alone, float64 [count]."""
    return np.multiply.accumulate(np.concatenate([[1.0], np.full(count - 1, root)]))


_SHARES = 1 / _powers(sqrt(sqrt(sqrt(2.0))), 8 * 40)[::-1]  # eighths of an octave from 2^-40, the last is 1


@dataclass(frozen=True, eq=False)
class Expected:
    """Classes of symbols, by the energy of their row: all that a step and a basis decide."""

    classes: np.ndarray  # uint8 [ENERGIES, k]
    sizes: (
        np.ndarray
    )  # int64 [ENERGIES, CLASSES]: how many symbols of such a row each class has; none of a row of zeros


_FINE_ENERGIES = (_FINE * (np.arange(ENERGIES) - 1 - _LOWEST)).astype(np.int16)
_FIRST_CLASSES = CLASSES * np.arange(ENERGIES)[:, None]


class Contexts:
    """The shared expectations of one direction of a link. Both ends `learn` from the same symbols.

    Arrays are replaced, never written to: whoever holds one has it as it was.
    """

    def __init__(self, deviations: np.ndarray, dithered: bool = False):
        """`deviations`: float32 [k]. Raises ValueError if one is negative or not finite."""
        self.dithered = dithered
        self.counts = first_counts()  # int64 [CLASSES, SYMBOLS]
        self.energy_counts = np.full((1, ENERGIES), _SEEN, np.int64)
        self.rebase(deviations)

    def rebase(self, deviations: np.ndarray) -> None:
        """The coefficients are those of a new basis, with these deviations; the histograms stay."""
        if not (np.isfinite(deviations).all() and (deviations >= 0).all()):
            raise ValueError("deviations must be finite and not negative")
        self.deviations = deviations.astype(np.float32)
        self.last: tuple[float, Expected] | None = None  # a step changes between ticks, if at all

    def expected(self, step: float) -> Expected:
        if self.last is None or self.last[0] != step:
            self.last = step, self._expected(step)
        return self.last[1]

    def _expected(self, step: float) -> Expected:
        fine = np.add.outer(_FINE_ENERGIES, self._shares(step)) >> 2  # floor division by _FINE
        classes = np.minimum(np.maximum(fine, 0), CLASSES - 1)
        sizes = np.bincount((classes + _FIRST_CLASSES).reshape(-1), minlength=ENERGIES * CLASSES)
        sizes[:CLASSES] = 0
        return Expected(classes.astype(np.uint8), sizes.reshape(ENERGIES, CLASSES))

    def _shares(self, step: float) -> np.ndarray:
        """Share of each coefficient in Σ|q| of a row, in eighths of an octave, int16 [k].

        As of Laplacian coefficients: mean |q| = Σ P(|z| > (j - 0.4) step) over j = 1, 2, …; dithered, mean |z| in steps.
        """
        width = self.deviations.astype(np.float64) / (step * sqrt(2))  # mean |z| in steps
        width = np.minimum(np.maximum(width, 1e-6), 1e6)
        mean = width
        if not self.dithered:
            first, ratio = _decay(np.divide.outer((0.6, 1.0), width))
            mean = first / (1 - ratio)
        below = _SHARES.searchsorted(mean / fsum(mean.tolist()), "right")  # fsum is exact in any order
        return (below - _SHARES.size).astype(np.int16)

    def learn(self, energies: np.ndarray, seen: np.ndarray) -> None:
        """One payload: how often each energy was seen, int64 [ENERGIES], and each symbol in each class."""
        self.counts, self.energy_counts = _added(self.counts, seen), _added(self.energy_counts, energies[None])

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that both ends share."""
        return {name: torch.from_numpy(array.copy()) for name, array in self._arrays().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()`, bit for bit. Raises ValueError if it is of another number of coefficients."""
        for name, array in self._arrays().items():
            saved = state[name].cpu().numpy()
            if saved.shape != array.shape or saved.dtype != array.dtype:
                raise ValueError(f"{name!r} is {saved.dtype} {saved.shape}, not {array.dtype} {array.shape}")
            setattr(self, name, saved.copy())
        self.last = None

    def digest(self) -> int:
        """64-bit xxh3 of everything that both ends share."""
        digest = xxhash.xxh3_64()
        for array in self._arrays().values():
            digest.update(array.data)
        return digest.intdigest()

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"deviations": self.deviations, "counts": self.counts, "energy_counts": self.energy_counts}


def _added(counts: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Histograms, int64 [histograms, symbols], with what was seen; those that grow too heavy are halved."""
    counts = counts + _SEEN * seen
    heavy = counts.sum(1) > _FORGET
    if heavy.any():
        counts[heavy] -= counts[heavy] >> 1  # never to 0
    return counts


def cost(seen: np.ndarray, counts: np.ndarray) -> float:
    """Bits of the symbols `seen` under histograms `counts`, at exactly -log2 p."""
    return float((seen * np.log2(counts.sum(1, keepdims=True) / counts)).sum())


def _decay(x: np.ndarray) -> np.ndarray:
    """About exp(-x) for x >= 0, the same on every machine."""
    return 1 / (1 + x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4))))


@cache
def first_counts() -> np.ndarray:
    """Geometric histograms with the mean that each class stands for, int64 [CLASSES, SYMBOLS], for all who begin with them."""
    mean = _powers(sqrt(2.0), CLASSES) / 2.0 ** (-_LOWEST // 2)
    ratio = mean / (1 + mean)
    # P(|q| >= m) = ratio^m at the smallest magnitude m of each symbol: 0 to DIRECT, then by squaring
    tail = [np.ones(CLASSES), *np.multiply.accumulate([ratio] * DIRECT)]
    one_and_half, twice = tail[DIRECT] * tail[DIRECT // 2], tail[DIRECT] ** 2
    while len(tail) <= SYMBOLS:
        tail += [one_and_half, twice]
        one_and_half, twice = one_and_half**2, twice**2
    probability = -np.diff(np.stack(tail, axis=1), axis=1)
    counts = 1 + (probability * (_PRIOR * _SEEN)).astype(np.int64)
    counts.flags.writeable = False
    return counts
