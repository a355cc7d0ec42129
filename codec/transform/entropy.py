"""Coefficients as entropy-coded integers: the size follows the data, the error follows the step.

    z [N, k] ─▶ q = whole steps ─┬─▶ |q|: symbol of a class ─ANS─▶ words
                                 └─▶ signs, low bits of large |q| ─▶ plain bits
    ẑ = q · step

Classes and histograms are those of codec/transform/symbol_statistics.py; both ends learn from the decoded symbols alone. All
symbols of a class are coded in one call (codec/transform/ans.py), which is what makes it fast. A body:

    count of words u32 │ words u32 … │ signs of what is not 0 │ low bits of large |q|      (little-endian)

Rounding looks at the price: the dead zone around 0 is wider where a nonzero symbol is dear. Nothing is
clamped: a large |q| costs more bits. A row of zeros costs its energy and nothing else.

With subtractive dither  q = round(z / step + u),  ẑ = (q - u) · step,  u uniform in ±1/2 and drawn from a key of the row
(codec/keyed.py): whatever z is, the error is uniform in ±step/2 and of mean 0. It needs steps of one size and no dead zone, so
it costs bytes, or at equal bytes error. Only a row that is 0 as a whole stays 0.

References: Schuchman 1964, "Dither Signals and Their Effect on Quantization Noise", IEEE Trans. Commun. Technol. 12(4).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from codec.keyed import centred_uniforms
from codec.transform.ans import WordReader, WordWriter
from codec.transform.symbol_statistics import CLASSES, ENERGIES, Contexts, first_counts, tally
from codec.transform.symbols import DIRECT, MAGNITUDE_BITS, pack_bits, plain_bits, symbols_of, unpack_bits

# Squared steps that a bit is worth. At high rates the squared error is step²/12 and a bit less costs 2·ln 2 of
# it. Against one offset of 0.4 for all this saves 4 % of the bytes, and it leaves magnitudes so near the middle
# of their cells that centroids, if they were sent, would take less than 1 % off the error.
_PRICE = 0.1155
_MIN_OFFSET = 0.1  # |z| of 0.9 steps and more is never rounded to 0, however dear
_PLAIN_OFFSET = 0.35  # before the classes are known: for the energies, which decide them


@dataclass(frozen=True)
class EncodeStats:
    """`bits`: all symbols at exactly -log2 p, and the plain bits; `escapes`: how many |q| need low bits."""

    bits: float
    escapes: int


class EntropyCoder:
    """One end of one direction of a link. Sender and receiver stay in step as long as no payload is lost."""

    def __init__(self, deviations: Tensor, dithered: bool = False):
        """`deviations`: float32 [k], of each coefficient over the rows; decoded rows lie on their device.

        `dithered`: both ends give the keys of the rows with them, int64 [N]. Raises ValueError if one is negative or not finite.
        """
        self.device = deviations.device
        self.dithered = dithered
        self.contexts = Contexts(deviations.detach().cpu().numpy(), dithered)
        # Never learns: what is rounded to what must depend on nothing but rows, step and tables. Log-probs that
        # are computed before an update and in it are then equal, and so are those of another layout.
        self.prior = first_counts()

    def encode(self, z: Tensor, step: float, keys: Tensor | None = None) -> tuple[np.ndarray, Tensor, EncodeStats]:
        """Coefficients [N, k] -> (body, uint8; what decode makes of it, float32 [N, k]; statistics). Then learns.

        Raises ValueError if z holds a NaN, an infinity or 2^31 steps, or if `step` is no positive float32.
        """
        step = _checked(step)
        z = z.detach().float()
        a = z.abs() / step
        if a.numel() and not a.max() < 2.0**MAGNITUDE_BITS:
            raise ValueError(f"the largest coefficient is {a.max().item():g} steps of {step:g}: cannot be coded")
        dither = self._dither(keys)
        if dither is None:
            energy = _energies((a + _PLAIN_OFFSET).floor_())
            classes = self.contexts.classes(energy, step)
            q = torch.copysign(self._rounded(a, classes), z).to(torch.int32)
            sent = q.any(1)  # of other rows nothing but their energy is
        else:
            sent = z.any(1)
            q = (z / step).add_(dither).round_().mul_(sent[:, None]).to(torch.int32)
            energy = _energies(q.abs())
            classes = self.contexts.classes(energy, step)
        energy[~sent.cpu().numpy()] = 0
        body, stats = self._write(q.cpu().numpy(), energy, classes)
        return body, _values(q, step, dither, sent), stats

    def decode(self, body: np.ndarray, n: int, step: float, keys: Tensor | None = None) -> Tensor:
        """Body of `n` rows -> float32 [n, k], bit for bit what encode gave. Then learns.

        Raises ValueError naming what is wrong with the body; nothing was learnt then.
        """
        step = _checked(step)
        q, rows = self._read(body, n, step)
        sent = torch.zeros(n, dtype=torch.bool, device=self.device)
        sent[torch.from_numpy(rows).to(self.device)] = True
        return _values(torch.from_numpy(q).to(self.device), step, self._dither(keys), sent)

    def rebase(self, deviations: Tensor) -> None:
        """A new basis: what is known of each coefficient starts from its deviation, the histograms stay."""
        self.contexts.rebase(deviations.detach().cpu().numpy())

    def state(self) -> dict[str, Tensor]:
        """A copy of all that both ends share, for a checkpoint."""
        return self.contexts.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state()`, bit for bit. Raises ValueError if it is of other coefficients."""
        self.contexts.restore(state)

    def digest(self) -> int:
        """64 bits over all that both ends must share."""
        return self.contexts.digest()

    def _dither(self, keys: Tensor | None) -> Tensor | None:
        """float32 [N, k]; None without it."""
        if not self.dithered:
            return None
        assert keys is not None  # `Codec.rekey` comes before rows
        return centred_uniforms(keys, self.contexts.deviations.size)

    def _rounded(self, a: Tensor, classes: np.ndarray) -> Tensor:
        """|z| in steps, float32 [N, k], and the class of each -> |q|, float32 [N, k].

        1 is better than 0 if  (a - 1)² + price · bits(1) < a² + price · bits(0).  The offset to which this
        comes for a class serves its larger magnitudes too, where it matters little.
        """
        zeros, ones = self.prior[:, 0], self.prior[:, 1]
        dearer = np.log2(zeros / ones) + 1  # the 1 is the sign
        offset = np.clip(0.5 - _PRICE / 2 * dearer, _MIN_OFFSET, 0.5).astype(np.float32)
        offset_of_class = torch.from_numpy(offset).to(a.device)
        return torch.take(offset_of_class, torch.from_numpy(classes).to(a.device).long()).add_(a).floor_()

    def _write(self, q: np.ndarray, energy: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, EncodeStats]:
        """q, int32 [N, k], energies [N] and classes [N, k] -> body. Learns."""
        rows = energy > 0
        q, classes = q[rows].reshape(-1), classes[rows].reshape(-1)
        magnitude = np.abs(q)
        symbols = symbols_of(magnitude)
        order, runs = _by_class(classes)
        in_order, writer = symbols.take(order), WordWriter()
        writer.put(energy, self.contexts.energy_counts[0])
        for c, run in runs:
            writer.put(in_order[run], self.contexts.counts[c])
        words = writer.words()
        large = symbols >= DIRECT
        smallest, lengths = plain_bits(symbols[large])
        signs = np.packbits(q.compress(magnitude > 0) < 0, bitorder="little")
        parts = [np.array([words.size], "<u4"), words, signs, pack_bits(magnitude[large] - smallest, lengths)]

        seen = tally(classes, symbols)
        plain = int(np.count_nonzero(magnitude)) + int(lengths.sum())
        stats = EncodeStats(self.contexts.bits(energy, seen) + plain, lengths.size)
        self.contexts.learn(energy, seen)
        return np.concatenate([part.view(np.uint8) for part in parts]), stats

    def _read(self, body: np.ndarray, n: int, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `_write`: int32 [n, k], and which rows were sent at all. Learns."""
        words, plain = _split(body, n)
        reader = WordReader(words)
        energy = reader.take(n, self.contexts.energy_counts[0])
        rows = np.flatnonzero(energy)
        classes = self.contexts.classes(energy[rows], step).reshape(-1)
        order, runs = _by_class(classes)
        symbols = np.empty(classes.size, np.int32)
        for c, run in runs:
            symbols[order[run]] = reader.take(run.stop - run.start, self.contexts.counts[c])
        reader.finish()
        q = np.zeros((n, self.contexts.deviations.size), np.int32)
        q[rows] = _with_plain_bits(symbols, plain).reshape(rows.size, q.shape[1])
        self.contexts.learn(energy, tally(classes, symbols))
        return q, rows


def _checked(step: float) -> float:
    """The step as both ends use it: rounded to float32."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(step))
    if not 0 < rounded < np.inf:
        raise ValueError(f"step {step} is no positive float32")
    return rounded


def _energies(magnitudes: Tensor) -> np.ndarray:
    """|q| [N, k], or about them -> class of each row's Σ|q|, int32 [N], 1 and up. It is sent, so any would do."""
    return (2 * magnitudes.sum(1).log2() + 1).round_().clamp_(1, ENERGIES - 1).to(torch.int32).cpu().numpy()


def _values(q: Tensor, step: float, dither: Tensor | None, sent: Tensor) -> Tensor:
    values = q.float()
    return values.mul_(step) if dither is None else values.sub_(dither).mul_(step).mul_(sent[:, None])


def _by_class(classes: np.ndarray) -> tuple[np.ndarray, list[tuple[int, slice]]]:
    """Classes, uint8 [m] -> (order that brings each class together, int64 [m]; classes with their runs in it)."""
    ends = np.cumsum(np.bincount(classes, minlength=CLASSES)).tolist()
    runs = [(c, slice(first, end)) for c, (first, end) in enumerate(pairwise([0, *ends])) if first < end]
    return np.argsort(classes, kind="stable"), runs


def _split(body: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Body -> (words, plain bits), views. Raises ValueError if it has not the outer form of a body."""
    if n < 0 or body.dtype != np.uint8 or body.ndim != 1 or body.size < 4:
        raise ValueError(f"a body is a row of at least 4 uint8, not {body.dtype} {body.shape} for {n} rows")
    count = int(body[:4].view("<u4")[0])
    if 4 * count > body.size - 4:
        raise ValueError(f"{count} words do not fit in a body of {body.size} bytes")
    return body[4 : 4 + 4 * count].view("<u4"), body[4 + 4 * count :]


def _with_plain_bits(symbols: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Symbols, int32 [m], and the plain bits -> q, int32 [m]."""
    nonzero, large = np.flatnonzero(symbols > 0), np.flatnonzero(symbols >= DIRECT)
    smallest, lengths = plain_bits(symbols[large])
    signs, low = nonzero.size, int(lengths.sum())
    border = -(-signs // 8)
    if plain.size != border + -(-low // 8):
        raise ValueError(f"{plain.size} bytes of plain bits for {signs} signs and {low} low bits")
    negative = np.zeros(symbols.size, bool)
    negative[nonzero] = np.unpackbits(plain[:border], count=signs, bitorder="little")
    magnitude = symbols.copy()
    magnitude[large] = smallest + unpack_bits(plain[border:], lengths)
    return np.where(negative, -magnitude, magnitude)
