"""What both ends of a link expect of the next symbols: integer counts, learnt from the symbols before.

A symbol is a magnitude |q| in steps. Rows differ in energy and coefficients in variance, so

    expected |q| of coefficient i in row n  =  share_i · energy of row n (sent, in half octaves of Σ|q|)

and this, in half octaves, is the symbol's class. Every class has one histogram. As a class is a scale
relative to the step, histograms stay good when the step or the basis changes; the shares are the only
thing that has to be learnt anew then, and they start from the deviations.

Both ends must agree to the last bit, on different machines too: counts are integers, and whatever is
derived from them uses only + - * / and sqrt, which IEEE 754 rounds exactly. No exp, no log.
"""

from __future__ import annotations

from math import isqrt, sqrt

import numpy as np
import torch
import xxhash
from torch import Tensor

from codec.symbols import DIRECT, SYMBOLS

# --- classes -----------------------------------------------------------------------------------------------

CLASSES = 44
_LOWEST = -20  # class 0 expects |q| of 2^(-20/2) or less
_FINE = 4  # shares are measured this much finer than the classes, in eighths of an octave
_OCTAVES = 40  # shares below 2^-40 are not told apart
ENERGIES = 64  # class of a row: 0 for a row of zeros, then half octaves of Σ|q| from 1

# --- memory ------------------------------------------------------------------------------------------------

_SEEN = 64  # what one symbol adds to its count; the 1 that every count starts with is then nearly nothing
_PRIOR = 32  # a fresh histogram weighs as much as so many symbols
_FORGET = 1 << 22  # a histogram is halved when it holds so much
_PRIOR_ROWS = 32  # fresh shares weigh as much as so many rows
_FORGET_ROWS = 4096  # shares are halved when they hold so many rows
_UNIT = 16  # |q| = 1 in the sums that shares are made of


def _powers_of_root(root: float, count: int) -> np.ndarray:
    """root^0, root^1, … by multiplication alone, float64 [count]."""
    return np.multiply.accumulate(np.concatenate([[1.0], np.full(count - 1, root)]))


_EIGHTH = sqrt(sqrt(sqrt(2.0)))
_SHARES = 1 / _powers_of_root(_EIGHTH, 8 * _OCTAVES)[::-1]  # ascending thresholds, the last is 1
_ENERGY = np.array([0] + [isqrt(_UNIT**2 << energy) for energy in range(ENERGIES - 1)], np.int64)


class Contexts:
    """The shared expectations of one direction of a link. Both ends call `learn` with the same symbols."""

    def __init__(self, deviations: np.ndarray):
        """`deviations`: float32 [k]. Raises ValueError if one is negative or not finite."""
        self.counts = _first_counts()  # int64 [CLASSES, SYMBOLS]
        self.energy_counts = np.full(ENERGIES, _SEEN, np.int64)
        self.rebase(deviations)

    def rebase(self, deviations: np.ndarray) -> None:
        """Coefficients mean something new: forget their shares, keep the histograms."""
        if not (np.isfinite(deviations).all() and (deviations >= 0).all()):
            raise ValueError("deviations must be finite and not negative")
        self.deviations = deviations.astype(np.float32)
        self.sums = np.zeros(deviations.size, np.int64)  # Σ|q| of each coefficient, in 1/_UNIT
        self.seen = np.zeros(2, np.int64)  # Σ of the rows' energies in 1/_UNIT, and how many rows

    def classes(self, energy: np.ndarray, step: float) -> np.ndarray:
        """Energies of rows, int [n] -> class of each symbol, uint8 [n, k]. For rows of zeros it says nothing."""
        sums, seen = self._expected(step)
        share = np.searchsorted(_SHARES, (sums + 1) / seen[0], "right") - _SHARES.size  # eighths of an octave
        fine = share[None, :] + _FINE * (energy[:, None] - 1 - _LOWEST)
        return np.clip(fine // _FINE, 0, CLASSES - 1).astype(np.uint8)

    def bits(self, energy: np.ndarray, seen: np.ndarray) -> float:
        """Cost of one payload at -log2 p, with the arguments of `learn`."""
        return _cost(seen, self.counts) + _cost(np.bincount(energy, minlength=ENERGIES), self.energy_counts)

    def learn(self, energy: np.ndarray, magnitude: np.ndarray, seen: np.ndarray, step: float) -> None:
        """One payload: energies of all rows, int [N]; |q| of the rows that are not zero, int32 [n · k]; and how
        often each symbol was seen in each class, int64 [CLASSES, SYMBOLS]."""
        self.sums, self.seen = self._expected(step)
        magnitude = magnitude.reshape(-1, self.sums.size)
        self.sums += _UNIT * magnitude.sum(0, dtype=np.int64)
        self.seen += _ENERGY[energy].sum(), len(magnitude)
        if self.seen[1] > _FORGET_ROWS:
            self.sums >>= 1
            self.seen >>= 1
        _add(self.counts, seen)
        _add(self.energy_counts[None], np.bincount(energy, minlength=ENERGIES)[None])

    def _expected(self, step: float) -> tuple[np.ndarray, np.ndarray]:
        """`sums` and `seen`; before anything was seen, those of Laplacian coefficients of the given deviations."""
        if self.seen[0] > 0:
            return self.sums, self.seen
        width = np.maximum(self.deviations / (step * sqrt(2)), 1e-6)  # mean |z| in steps
        # mean |q|: Σ P(|z| > j - 0.4) over j = 1, 2, …
        mean = np.minimum(_decay(0.6 / width) / (1 - _decay(1 / width)), 2.0**20)
        sums = (mean * (_PRIOR_ROWS * _UNIT)).astype(np.int64)
        return sums, np.array([max(int(sums.sum()), 1), _PRIOR_ROWS])

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that both ends share."""
        return {name: torch.from_numpy(array.copy()) for name, array in self._arrays().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()`, bit for bit. Raises ValueError if it is of other coefficients."""
        for name, array in self._arrays().items():
            saved = state[name].numpy()
            if saved.shape != array.shape or saved.dtype != array.dtype:
                raise ValueError(f"{name!r} is {saved.dtype} {saved.shape}, not {array.dtype} {array.shape}")
            array[...] = saved

    def digest(self) -> int:
        """64-bit xxh3 of everything that both ends share."""
        digest = xxhash.xxh3_64()
        for array in self._arrays().values():
            digest.update(array)
        return digest.intdigest()

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("counts", "energy_counts", "deviations", "sums", "seen")
        return {name: getattr(self, name) for name in names}


def tally(classes: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """How often each symbol stands in each class, int64 [CLASSES, SYMBOLS]."""
    pairs = classes.astype(np.int64) * SYMBOLS + symbols
    return np.bincount(pairs, minlength=CLASSES * SYMBOLS).reshape(CLASSES, SYMBOLS)


def _add(counts: np.ndarray, seen: np.ndarray) -> None:
    """Into histograms, int64 [histograms, symbols], in place; those that grow too heavy are halved."""
    counts += _SEEN * seen
    heavy = counts.sum(1) > _FORGET
    counts[heavy] -= counts[heavy] >> 1  # never to 0


def _cost(seen: np.ndarray, counts: np.ndarray) -> float:
    """Bits of the symbols `seen` under histograms `counts`; only for statistics."""
    return float((seen * (np.log2(counts.sum(-1, keepdims=True)) - np.log2(counts))).sum())


def _decay(x: np.ndarray) -> np.ndarray:
    """About exp(-x) for x >= 0, the same on every machine."""
    return 1 / (1 + x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4))))


def _first_counts() -> np.ndarray:
    """Geometric histograms with the mean that each class stands for, int64 [CLASSES, SYMBOLS]."""
    mean = _powers_of_root(sqrt(2.0), CLASSES) / 2.0 ** (-_LOWEST // 2)
    ratio = mean / (1 + mean)
    # P(|q| >= m) = ratio^m at the smallest magnitude m of each symbol: 0 to DIRECT, then by squaring
    tail = [np.ones(CLASSES), *np.multiply.accumulate([ratio] * DIRECT)]
    one_and_half, twice = tail[DIRECT] * tail[DIRECT // 2], tail[DIRECT] ** 2
    while len(tail) <= SYMBOLS:
        tail += [one_and_half, twice]
        one_and_half, twice = one_and_half**2, twice**2
    probability = -np.diff(np.stack(tail, axis=1), axis=1)
    return 1 + (probability * (_PRIOR * _SEEN)).astype(np.int64)
