"""What the entropy coder does to every symbol, in whole arrays: between rows and classes, and by ANS to words.

All symbols of a class are coded in one call, the classes one after the other, behind the energies of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, starmap

import numpy as np

from codec.transform.ans import WordReader, WordWriter
from codec.transform.symbol_statistics import CLASSES, ENERGIES, Contexts, Expected
from codec.transform.symbols import DIRECT, LOW_BITS, SYMBOLS, symbols_of

_NEAR_ZERO = 26  # the first class that expects |q| of 8 and more


@dataclass(frozen=True, eq=False)
class Written:
    """The symbols of a payload as they are sent, and what there is to learn from them."""

    words: np.ndarray  # uint32
    negative: np.ndarray  # uint8: whether it is, for each q that is not 0, row by row
    large: np.ndarray  # int32: |q| that need low bits
    energies: np.ndarray  # int64 [ENERGIES]: how often each was seen
    seen: np.ndarray  # int64 [CLASSES, SYMBOLS], the same of symbols


@dataclass(frozen=True, eq=False)
class Read:
    """The symbols of a payload as they arrived."""

    energy: np.ndarray  # int32 [N]
    signs: int  # how many plain bits must have come: of signs
    low: int  # and of large |q|
    energies: np.ndarray  # these two as in `Written`
    seen: np.ndarray
    # signs, uint8 -> ± symbols, int32 [N · k], and which of them are large
    signed: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def write(q: np.ndarray, energy: np.ndarray, expected: Expected, known: Contexts) -> Written:
    """q, int32 [N, k], and the energies of its rows, int32 [N]; those that are 0 are not sent."""
    layout, models = _Layout(expected, energy), known.counts.astype(np.float64)
    q = (q if layout.rows.size == energy.size else q.take(layout.rows, 0)).reshape(-1)
    magnitude = np.abs(q)
    symbols, writer = symbols_of(magnitude), WordWriter()
    in_order = symbols.take(layout.order)
    writer.put(energy, known.energy_counts[0])
    for c, run in layout.runs:
        writer.put(in_order[run], models[c])
    negative = (q < 0).take((magnitude > 0).nonzero()[0]).view(np.uint8)
    large, seen = magnitude[magnitude >= DIRECT], layout.tally(symbols)
    return Written(writer.words(), negative, large, layout.energies, seen)


def read(words: np.ndarray, n: int, step: float, known: Contexts) -> Read:
    """The words of `n` rows. Raises ValueError if they cannot be what `write` made."""
    reader = WordReader(words)
    energy = reader.take(n, known.energy_counts[0])
    layout, models = _Layout(known.expected(step), energy), known.counts.astype(np.float64)
    parts = [reader.take(run.stop - run.start, models[c], c < _NEAR_ZERO) for c, run in layout.runs]
    reader.finish()
    symbols = np.empty(layout.order.size, np.int32)
    if parts:
        symbols[layout.order] = np.concatenate(parts)
    seen, rows, k = layout.tally(symbols), layout.rows, known.deviations.size

    def signed(signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonzero = (symbols > 0).nonzero()[0]
        minus = np.zeros(symbols.size, np.uint8)
        minus[nonzero] = np.unpackbits(signs, count=nonzero.size, bitorder="little")
        q = symbols * (1 - 2 * minus.astype(np.int32))
        if rows.size < n:
            q, sent = np.zeros((n, k), np.int32), q.reshape(rows.size, k)
            q[rows] = sent
            q = q.reshape(-1)
        return q, (np.abs(q) >= DIRECT).nonzero()[0]

    of_symbols = seen.sum(0)
    signs, low = int(of_symbols[1:].sum()), int(of_symbols[DIRECT:] @ LOW_BITS[:-1])
    return Read(energy, signs, low, layout.energies, seen, signed)


class _Layout:
    """Where the symbols of a payload lie: row by row, and class by class as they are coded."""

    def __init__(self, expected: Expected, energy: np.ndarray):
        self.rows = energy.nonzero()[0]
        self.energies = np.bincount(energy, minlength=ENERGIES)
        self.classes = expected.classes.take(energy.take(self.rows), 0).reshape(-1)
        self.order = self.classes.argsort(kind="stable")
        sizes = self.energies @ expected.sizes
        present = sizes.nonzero()[0]
        ends = sizes.take(present).cumsum().tolist()
        self.runs = list(zip(present.tolist(), starmap(slice, pairwise([0, *ends]))))

    def tally(self, symbols: np.ndarray) -> np.ndarray:
        """How often each symbol stands in each class, int64 [CLASSES, SYMBOLS]."""
        found = np.bincount(self.classes * np.int64(SYMBOLS) + symbols, minlength=CLASSES * SYMBOLS)
        return found.reshape(CLASSES, SYMBOLS)
