"""Coefficients as entropy-coded integers: the size follows the data, the error follows the step.

    z [N, k] ─▶ q = whole steps ─┬─▶ |q|: symbol of a class ─ANS─▶ words
                                 └─▶ signs, low bits of large |q| ─▶ plain bits
    ẑ = q · step

Classes and histograms are those of codec/transform/symbol_statistics.py; both ends learn from the decoded symbols alone. The
words are made by codec/transform/symbol_arrays.py. A body:

    count of words u32 │ words u32 … │ signs of what is not 0 │ low bits of large |q|      (little-endian)

Rounding looks at the price: the dead zone around 0 is wider where a nonzero symbol is dear. Nothing is
clamped: a large |q| costs more bits. A row of zeros costs its energy and nothing else.

With subtractive dither  q = round(z / step + u),  ẑ = (q - u) · step,  u uniform in ±1/2 and drawn from a key of the row
(codec/keyed.py): whatever z is, the error is uniform in ±step/2 and of mean 0. It needs steps of one size and no dead zone, so
it costs bytes, or at equal bytes error. Only a row that is 0 as a whole stays 0.

References: Schuchman 1964, "Dither Signals and Their Effect on Quantization Noise", IEEE Trans. Commun. Technol. 12(4).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from codec.keyed import centred_uniforms
from codec.transform import symbol_arrays
from codec.transform.symbol_arrays import Read
from codec.transform.symbol_statistics import ENERGIES, Contexts, Expected, cost, first_counts
from codec.transform.symbols import MAGNITUDE_BITS, pack_bits, plain_bits, symbols_of, unpack_bits

# Squared steps that a bit is worth. At high rates the squared error is step²/12 and a bit less costs 2·ln 2 of
# it. Against one offset of 0.4 for all this saves 4 % of the bytes, and it leaves magnitudes so near the middle
# of their cells that centroids, if they were sent, would take less than 1 % off the error.
_PRICE = 0.1155
_MIN_OFFSET = 0.1  # |z| of 0.9 steps and more is never rounded to 0, however dear
_PLAIN_OFFSET = 0.35  # before the classes are known: for the energies, which decide them
_STEP = struct.Struct("<f")


@dataclass(frozen=True, eq=False)
class EncodeStats:
    """`escapes`: how many |q| need low bits; `plain`: all plain bits."""

    # how often symbols were seen, and the histograms that they were coded with
    coded: tuple[tuple[np.ndarray, np.ndarray], ...]
    plain: int
    escapes: int

    @property
    def bits(self) -> float:
        """All symbols at exactly -log2 p, and the plain bits."""
        return sum(cost(seen, counts) for seen, counts in self.coded) + self.plain


class EntropyCoder:
    """One end of one direction of a link. Sender and receiver stay in step as long as no payload is lost."""

    def __init__(self, deviations: Tensor, dithered: bool = False):
        """`deviations`: float32 [k], of each coefficient over the rows; decoded rows lie on their device.

        `dithered`: both ends give the keys of the rows with them, int64 [N]. Raises ValueError if one is negative or not finite.
        """
        self.device = deviations.device
        self.dithered = dithered
        self.contexts = Contexts(deviations.detach().cpu().numpy(), dithered)
        self.offsets: tuple[Expected, Tensor] | None = None  # of a sender that does not dither

    def encode(self, z: Tensor, step: float, keys: Tensor | None = None) -> tuple[np.ndarray, Tensor, EncodeStats]:
        """Coefficients [N, k] -> (body, uint8; what decode makes of it, float32 [N, k]; statistics). Then learns.

        Raises ValueError if z holds a NaN, an infinity or 2^31 steps, or if `step` is no positive float32.
        """
        step = _checked(step)
        z = z.detach().float()
        a = z.abs().div_(step)
        largest = a.max().item() if a.numel() else 0.0
        if not largest < 2.0**MAGNITUDE_BITS:
            raise ValueError(f"the largest coefficient is {largest:g} steps of {step:g}: cannot be coded")
        dither, expected = self._dither(keys), self.contexts.expected(step)
        if dither is None:
            energy = _energies((a + _PLAIN_OFFSET).floor_())
            offsets = self._offsets(expected, z.device).index_select(0, energy)
            q = torch.copysign(offsets.add_(a).floor_(), z).to(torch.int32)
            whole, sent = q.cpu().numpy(), None
            rows = whole.any(1)  # of other rows nothing but their energy is sent
        else:
            sent = z.any(1)
            q = (z / step).add_(dither).round_().mul_(sent[:, None]).to(torch.int32)
            energy = _energies(q.abs())
            whole, rows = q.cpu().numpy(), sent.cpu().numpy()
        body, stats = self._write(whole, energy.cpu().numpy() * rows, expected)
        return body, _values(q, step, dither, sent), stats

    def decode(self, body: np.ndarray, n: int, step: float, keys: Tensor | None = None) -> Tensor:
        """Body of `n` rows -> float32 [n, k], bit for bit what encode gave. Then learns.

        Raises ValueError naming what is wrong with the body; nothing was learnt then.
        """
        step = _checked(step)
        q, rows = self._read(body, n, step)
        dither = self._dither(keys)
        sent = None if dither is None else torch.from_numpy(rows).to(self.device)
        return _values(torch.from_numpy(q).to(self.device), step, dither, sent)

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

    def _offsets(self, expected: Expected, device: torch.device) -> Tensor:
        """By the energy of a row: what is added to |z| in steps before it is rounded down, float32 [ENERGIES, k]."""
        if self.offsets is None or self.offsets[0] is not expected:
            self.offsets = expected, torch.from_numpy(_offset_of_class().take(expected.classes)).to(device)
        return self.offsets[1]

    def _write(self, q: np.ndarray, energy: np.ndarray, expected: Expected) -> tuple[np.ndarray, EncodeStats]:
        """q, int32 [N, k], and energies [N] -> body. Learns."""
        known = self.contexts
        found = symbol_arrays.write(q, energy, expected, known)
        count, words = np.array([found.words.size], "<u4"), found.words.astype("<u4", copy=False)
        parts = [count.view(np.uint8), words.view(np.uint8), np.packbits(found.negative, bitorder="little")]
        plain = found.negative.size
        if found.large.size:
            smallest, lengths = plain_bits(symbols_of(found.large))
            parts.append(pack_bits(found.large - smallest, lengths))
            plain += int(lengths.sum())
        coded = (found.seen, known.counts), (found.energies[None], known.energy_counts)
        known.learn(found.energies, found.seen)
        return np.concatenate(parts), EncodeStats(coded, plain, found.large.size)

    def _read(self, body: np.ndarray, n: int, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `_write`: int32 [n, k], and which rows were sent at all, bool [n]. Learns."""
        words, plain = _split(body, n)
        found = symbol_arrays.read(words, n, step, self.contexts)
        q = _with_plain_bits(found, plain).reshape(n, self.contexts.deviations.size)
        self.contexts.learn(found.energies, found.seen)
        return q, found.energy > 0


def _checked(step: float) -> float:
    """The step as both ends use it: rounded to float32."""
    try:
        (rounded,) = _STEP.unpack(_STEP.pack(step))
    except OverflowError:
        rounded = math.inf
    if not 0 < rounded < math.inf:
        raise ValueError(f"step {step} is no positive float32")
    return rounded


@cache
def _offset_of_class() -> np.ndarray:
    """What is added to |z| in steps before it is rounded down, float32 [CLASSES].

    1 is better than 0 if  (a - 1)² + price · bits(1) < a² + price · bits(0).  The offset to which this
    comes for a class serves its larger magnitudes too, where it matters little.

    By the first histograms, which never learn: what is rounded to what must depend on nothing but rows, step and tables.
    Log-probs that are computed before an update and in it are then equal, and so are those of another layout.
    """
    zeros, ones = first_counts()[:, 0], first_counts()[:, 1]
    dearer = np.log2(zeros / ones) + 1  # the 1 is the sign
    return np.clip(0.5 - _PRICE / 2 * dearer, _MIN_OFFSET, 0.5).astype(np.float32)


def _energies(magnitudes: Tensor) -> Tensor:
    """|q| [N, k], or about them -> class of each row's Σ|q|, int32 [N], 1 and up. It is sent, so any would do."""
    return magnitudes.sum(1).log2().mul_(2).add_(1).round_().clamp_(1, ENERGIES - 1).to(torch.int32)


def _values(q: Tensor, step: float, dither: Tensor | None, sent: Tensor | None) -> Tensor:
    values = q.float()
    return values.mul_(step) if sent is None or dither is None else values.sub_(dither).mul_(step).mul_(sent[:, None])


def _split(body: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Body -> (words, plain bits), views. Raises ValueError if it has not the outer form of a body."""
    if n < 0 or body.dtype != np.uint8 or body.ndim != 1 or body.size < 4:
        raise ValueError(f"a body is a row of at least 4 uint8, not {body.dtype} {body.shape} for {n} rows")
    count = int(body[:4].view("<u4")[0])
    if 4 * count > body.size - 4:
        raise ValueError(f"{count} words do not fit in a body of {body.size} bytes")
    return body[4 : 4 + 4 * count].view("<u4"), body[4 + 4 * count :]


def _with_plain_bits(found: Read, plain: np.ndarray) -> np.ndarray:
    """Symbols and the plain bits -> q, int32 [N · k]."""
    border = -(-found.signs // 8)
    if plain.size != border + -(-found.low // 8):
        raise ValueError(f"{plain.size} bytes of plain bits for {found.signs} signs and {found.low} low bits")
    q, large = found.signed(plain[:border])
    if large.size:
        symbols = q[large]
        smallest, lengths = plain_bits(np.abs(symbols))
        magnitude = smallest + unpack_bits(plain[border:], lengths)
        q[large] = np.where(symbols < 0, -magnitude, magnitude)
    return q
