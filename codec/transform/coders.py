"""The coders of `transform`, each with a knob that trades bytes for error."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.transform.entropy import EntropyCoder
from codec.transform.fixed import GAIN_BITS, FixedCoder
from codec.transform.lloyd_max import MAX_BITS, allocate
from codec.transform.water_filling import reverse_water_filling

SPARE_BITS = 1.3  # a held rate may ask for so much more than it does on average
# of the water level: at 5 % of SmolLM2 324 of 576 directions, with a lower error at equal bytes than 551 (0.1) or 254 (1.5)
SPARE_LEVEL = 0.8
# A rate that allows more for each coefficient is not spent: bf16 itself rounds as coarsely, and where few rows stand for many
# tokens a step would become finer until no integer holds a coefficient
ENOUGH_BITS = 8.0
TRIALS = 14  # halvings of an interval of 18 nepers: the first step is right to 0.1 %


class Coder(Protocol):
    """One side of a way: coefficients z [N, k] to bytes and back."""

    def rekey(self, keys: Tensor) -> None:
        """Before each encode and decode of a way that is dithered: a key for each row, int64 [N]."""
        ...

    def rebase(self, deviations: Tensor) -> None:
        """New directions, with these standard deviations [k]."""
        ...

    def worthwhile(self, variances: Tensor, bits: float) -> int:
        """How many of the directions with these falling variances [H] it can use at that many bits a row."""
        ...

    def encode(self, z: Tensor, knob: float) -> tuple[Tensor, Tensor, int]:
        """-> body uint8, what decode makes of it [N, k], symbols that had to escape."""
        ...

    def decode(self, body: Tensor, n: int, knob: float) -> Tensor:
        """-> [n, k]. Raises ValueError on a damaged body."""
        ...

    def most_bytes(self, n: int, k: int) -> int:
        """No body of n rows and k coefficients is larger."""
        ...

    def digest(self) -> int:
        """Of all that sender and receiver must have alike beside the tables, 64 bits."""
        ...

    def first_knob(self, z: Tensor, bits: float) -> float:
        """A knob that spends about that many bits a row on rows like these."""
        ...

    def next_knob(self, knob: float, spent: float, wanted: float) -> float:
        """The knob for `wanted` bits a row, after one that spent `spent`."""
        ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


class Fixed:
    """The knob is a number of bits a row."""

    def rekey(self, keys: Tensor) -> None: ...

    def worthwhile(self, variances: Tensor, bits: float) -> int:
        deviations = variances.sqrt().float().cpu().numpy()
        return int(np.count_nonzero(allocate(deviations, math.ceil(SPARE_BITS * bits))))

    def rebase(self, deviations: Tensor) -> None:
        self.coder = FixedCoder(deviations)

    def encode(self, z: Tensor, knob: float) -> tuple[Tensor, Tensor, int]:
        body, z_hat = self.coder.encode(z, int(knob))
        return body, z_hat, 0

    def decode(self, body: Tensor, n: int, knob: float) -> Tensor:
        if knob != int(knob):
            raise ValueError(f"knob {knob} is not a whole number of bits a row")
        return self.coder.decode(body, n, int(knob))

    def most_bytes(self, n: int, k: int) -> int:
        return n * (MAX_BITS * k + 8) // 8 + MAX_BITS + 2

    def digest(self) -> int:
        return 0

    def first_knob(self, z: Tensor, bits: float) -> float:
        return self.next_knob(0, 0, bits)

    def next_knob(self, knob: float, spent: float, wanted: float) -> float:
        most = GAIN_BITS + MAX_BITS * self.coder.deviations.numel()
        return float(min(max(1, math.floor(wanted)), most))

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None: ...


class Entropy:
    """The knob is the step. Learns from what it codes; see codec/transform/symbol_statistics.py."""

    def __init__(self, dithered: bool) -> None:
        self.known: EntropyCoder | None = None
        self.dithered = dithered
        self.keys: Tensor | None = None  # of the rows to come, if they are dithered

    def rekey(self, keys: Tensor) -> None:
        self.keys = keys

    @property
    def coder(self) -> EntropyCoder:
        assert self.known is not None  # tables come before rows
        return self.known

    @property
    def _enough(self) -> float:
        """Bits a row."""
        return ENOUGH_BITS * self.deviations.numel()

    def worthwhile(self, variances: Tensor, bits: float) -> int:
        """Rows stray: some reach a step where most do not, down to directions below the water level."""
        _, level = reverse_water_filling(variances, bits)
        return int((variances > SPARE_LEVEL * level).sum())

    def rebase(self, deviations: Tensor) -> None:
        self.deviations = deviations
        if self.known is None:
            self.known = EntropyCoder(deviations, self.dithered)
        else:
            self.known.rebase(deviations)

    def encode(self, z: Tensor, knob: float) -> tuple[Tensor, Tensor, int]:
        body, z_hat, stats = self.coder.encode(z, knob, self.keys)
        return torch.from_numpy(body).to(z.device), z_hat, stats.escapes

    def decode(self, body: Tensor, n: int, knob: float) -> Tensor:
        return self.coder.decode(body.cpu().numpy(), n, knob, self.keys)

    def most_bytes(self, n: int, k: int) -> int:
        return 1024 + 4 * n + 8 * n * k  # a symbol of least probability, 31 plain bits and a sign: below 64 bits

    def digest(self) -> int:
        return self.coder.digest()

    def first_knob(self, z: Tensor, bits: float) -> float:
        """By trial, with coders that know nothing yet."""
        bits = min(bits, self._enough)
        low = high = math.log(max(z.std().item(), 1e-20))
        low, high = low - 12, high + 6
        for _ in range(TRIALS):
            middle = (low + high) / 2
            body = EntropyCoder(self.deviations, self.dithered).encode(z, math.exp(middle), self.keys)[0]
            low, high = (middle, high) if 8 * body.size > bits * len(z) else (low, middle)
        return math.exp(high)

    def next_knob(self, knob: float, spent: float, wanted: float) -> float:
        """Bits fall about as step^-1.4; nothing moves for less than 1 %, as each move redraws all rounding errors."""
        ratio = spent / max(min(wanted, self._enough), 1e-9)
        return knob * min(max(ratio, 0.5), 2.0) ** 0.7 if abs(ratio - 1) > 0.01 else knob

    def state(self) -> dict[str, Tensor]:
        return {} if self.known is None else self.known.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        if state:
            self.coder.restore(state)


def make_coder(config: CodecConfig) -> Coder:
    """One side of a way."""
    return Fixed() if config.coder == "fixed" else Entropy(config.dither)
