"""Coefficients at a fixed number of bits a row: a gain and Lloyd-Max codes. The size is known before the data.

    z [N, k] ─÷σ─▶ y ─┬─▶ gain of the row, 6 bits ─▶ packed
                      └─÷gain─▶ cell of a fine grid ─table─▶ code of b_i bits ─▶ packed, a run for each width b

The bits b_i of a coefficient follow from its deviation and the bits of a row (codec/transform/lloyd_max.py), so
nothing else is sent. The gain is for rows that differ in energy: without it the gradients of SmolLM2
lose 52 % of their energy at 5 % of bf16, with it 30 %, and those of the tiny model 36 % and 1 %.
Values beyond the outermost level are clamped to it. Speed decides the form: a table of cells costs
2 ns a coefficient on one core at any width, torch.bucketize 8 to 30 ns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from codec.transform.lloyd_max import MAX_BITS, allocate, levels, thresholds

_FINE = 256  # cells a standard deviation: a threshold is off by 1/512 at most, which costs nothing measurable
_CELLS = 8 * _FINE  # from -4 to 4 deviations; the outermost threshold of 7 bits is 3.96

GAIN_BITS = 6
_GAIN_STEPS = 2  # an octave; finer ones gain 1 %, at the cost of a bit a row
_UNIT_GAIN = 48  # the code of gain 1: gains go from 2^-23.5 to 2^7.5, and code 0 is a row of zeros


@dataclass(frozen=True)
class _Plan:
    """What `bits_per_row` comes to: the coefficients that get any bits, c of them, sorted by their bits."""

    columns: Tensor  # int64 [c]
    deviations: Tensor  # float32 [c]
    cells: Tensor  # int64 [c], start of the column's width in the table of cells
    codes: Tensor  # int64 [c], start of the column's width in the table of levels
    runs: tuple[tuple[int, int, int], ...]  # (bits, first column, end)


class FixedCoder:
    """Coder of one direction of a boundary; has no state that moves, so one instance serves both ends."""

    def __init__(self, deviations: Tensor):
        """`deviations`: float32 [k], of each coefficient over the rows. A deviation of 0 gets no bits.

        Raises ValueError if one is negative or not finite.
        """
        device, widths = deviations.device, range(1, MAX_BITS + 1)
        self.deviations = deviations
        self.plans = {0: self._make_plan(0)}
        centres = (np.arange(_CELLS) + 0.5) / _FINE - _CELLS / _FINE / 2
        cells = np.concatenate([np.searchsorted(thresholds(b), centres) for b in widths])
        self.code_of_cell = torch.from_numpy(cells.astype(np.uint8)).to(device)
        self.level_of_code = torch.from_numpy(np.concatenate([levels(b) for b in widths])).float().to(device)
        gains = [0.0] + [2 ** ((code - _UNIT_GAIN) / _GAIN_STEPS) for code in range(1, 1 << GAIN_BITS)]
        self.gain_of_code = torch.tensor(gains, device=device)

    def encode(self, z: Tensor, bits_per_row: int) -> tuple[Tensor, Tensor]:
        """Coefficients [N, k] -> (body, uint8 [size]; what decode makes of it, float32 [N, k]).

        Raises ValueError if z holds a NaN or an infinity.
        """
        if not torch.isfinite(z).all():
            raise ValueError("a coefficient is a NaN or an infinity: it cannot be quantised")
        plan = self._plan(bits_per_row)
        y = z[:, plan.columns].float() / plan.deviations
        gains = self._gain_codes(y, plan)
        fine = _FINE / self.gain_of_code[gains.long()].clamp_min(2.0**-24)
        cell = (y * fine[:, None]).add_(_CELLS / 2).clamp_(0, _CELLS - 1).to(torch.int64)
        codes = torch.take(self.code_of_cell, cell.add_(plan.cells))
        body = [_pack(codes[:, first:end].reshape(-1), bits) for bits, first, end in plan.runs]
        if body:
            body.insert(0, _pack(gains, GAIN_BITS))
        return torch.cat([gains.new_empty(0), *body]), self._values(gains, codes, plan)

    def decode(self, body: Tensor, n: int, bits_per_row: int) -> Tensor:
        """Body of `n` rows -> float32 [n, k], bit for bit what encode gave. Raises ValueError on a wrong size."""
        sizes = self._sizes(n, bits_per_row)
        if body.dtype != torch.uint8 or body.shape != (sum(sizes),):
            found = f"{body.dtype} {tuple(body.shape)}"
            raise ValueError(f"body is {found}; {n} rows of {bits_per_row} bits are torch.uint8 ({sum(sizes)},)")
        plan = self._plan(bits_per_row)
        if not plan.runs:
            return self.deviations.new_zeros(n, self.deviations.numel())
        gains, *runs = body.split(sizes)
        codes = [_unpack(run, n * (end - a), bits).view(n, end - a) for run, (bits, a, end) in zip(runs, plan.runs)]
        return self._values(_unpack(gains, n, GAIN_BITS), torch.cat(codes, dim=1), plan)

    def size(self, n: int, bits_per_row: int) -> int:
        """Exact bytes of a body of `n` rows. Raises ValueError if `n` is negative."""
        return sum(self._sizes(n, bits_per_row))

    def _sizes(self, n: int, bits_per_row: int) -> list[int]:
        """Bytes of the gains and of each run; none at all if no coefficient gets any bits."""
        if n < 0:
            raise ValueError(f"a body of {n} rows")
        runs = self._plan(bits_per_row).runs
        sizes = [_packed_size(n * (end - first), bits) for bits, first, end in runs]
        return [_packed_size(n, GAIN_BITS), *sizes] if runs else []

    def _gain_codes(self, y: Tensor, plan: _Plan) -> Tensor:
        """Standardised coefficients [N, c] -> code of each row's gain, uint8 [N].

        The gain is a root mean square, weighted by the deviations: if the large coefficients were as light
        as the small ones, a row whose large ones alone are large would be clamped.
        """
        weights = plan.deviations / plan.deviations.sum()
        steps = (y.square() @ weights).log2() * (_GAIN_STEPS / 2)
        return steps.round_().add_(_UNIT_GAIN).clamp_(0, (1 << GAIN_BITS) - 1).to(torch.uint8)

    def _values(self, gains: Tensor, codes: Tensor, plan: _Plan) -> Tensor:
        """Gain codes [N] and codes [N, c] -> coefficients, float32 [N, k], 0 where there are no bits."""
        values = torch.take(self.level_of_code, codes + plan.codes)
        values.mul_(plan.deviations).mul_(self.gain_of_code[gains.long()][:, None])
        return values.new_zeros(len(codes), self.deviations.numel()).index_copy_(1, plan.columns, values)

    def _plan(self, bits_per_row: int) -> _Plan:
        if bits_per_row not in self.plans:
            self.plans[bits_per_row] = self._make_plan(bits_per_row)
        return self.plans[bits_per_row]

    def _make_plan(self, bits_per_row: int) -> _Plan:
        deviations = self.deviations.detach().cpu().numpy()
        bits = allocate(deviations, bits_per_row - GAIN_BITS).astype(np.int64)
        columns = np.argsort(bits, kind="stable")[np.count_nonzero(bits == 0) :]
        widths = bits[columns]
        borders = np.searchsorted(widths, np.arange(1, MAX_BITS + 2)).tolist()
        runs = [(b, first, end) for b, (first, end) in enumerate(pairwise(borders), 1) if end > first]

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.deviations.device)

        return _Plan(
            columns=tensor(columns),
            deviations=tensor(deviations[columns]),
            cells=tensor((widths - 1) * _CELLS),
            codes=tensor((1 << widths) - 2),
            runs=tuple(runs),
        )


def _packed_size(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 [m] -> their bits, lowest first, uint8 [m·bits/8 rounded up].

    Eight codes fill `bits` whole bytes, the low ones of an int64 (all machines here are little-endian).
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8).to(torch.int64)
    words = (padded << _shifts(bits, codes.device)).sum(1)
    packed = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return packed[: _packed_size(codes.numel(), bits)]


def _unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of `_pack`, uint8 [count]."""
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.nn.functional.pad(padded, (0, 8 - bits)).view(torch.int64)  # [count / 8, 1]
    codes = (words >> _shifts(bits, packed.device)) & ((1 << bits) - 1)
    return codes.view(-1)[:count].to(torch.uint8)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8 * bits, bits, device=device)
