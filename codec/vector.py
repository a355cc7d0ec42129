"""Long flat vectors in few bits a value: gradients between replicas, steps of the weights on their way to engines.

Lossy, so whoever sends keeps what was lost and sends it later (error feedback, Seide et al. 2014, "1-Bit Stochastic Gradient
Descent"; Karimireddy et al. 2019, arXiv:1901.09847). Values lie in blocks of BLOCK, each with a scale in bf16 of its own:

    entropy   x ─▶ q = whole steps of its block's rms ─▶ |q| ─ANS─▶ words, signs as plain bits      x̂ = q · step · rms
    sign      x ─▶ one bit                                                                         x̂ = ± mean |x|

A payload, little-endian, is under an xxh3-64 digest; the receiver knows how many values it has:

    entropy   digest u64 │ step f32 │ symbols u32 │ counts u16 … │ count of words u32 │ words u32 … │ scales bf16 … │ signs
    sign      digest u64 │ scales bf16 … │ signs

What is decoded depends on the payload alone, by single IEEE operations: every receiver gets the same bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from codec.bf16 import from_bf16, to_bf16
from codec.costs import SCALED
from codec.transform.ans import WordReader, WordWriter

BLOCK = SCALED
LEVELS = 127  # largest |q|, whatever the step
FARTHEST = 8.0  # rms of its block: what lies beyond is sent with the next vector, as all that is lost
TRIED = 128  # blocks on which a step is tried
HALVINGS = 24  # of an interval of 14 octaves: right to 1e-6, as Adam's first step needs, whose values are all alike
NEAR_ZERO = 1.5  # bits a value below which symbols are found sooner from 0 on than in halves
_DIGEST, _HEAD = 8, struct.Struct("<fI")


class VectorCoder(Protocol):
    """Stateless: what one call loses is its caller's to keep."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [n] -> (payload, uint8; what decode makes of it, float32 [n]). Raises ValueError if x is not finite."""
        ...

    def decode(self, payload: Tensor, n: int) -> Tensor:
        """Payload -> float32 [n], on its device. Raises ValueError naming what is wrong with it."""
        ...

    def limits(self, n: int) -> tuple[int, int]:
        """The least and the most bytes that a payload of n values can have."""
        ...


class SignVector:
    """One bit a value and a scale a block."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = _means(x.abs()).bfloat16().float()
        plus = x > 0
        raw = _sealed([_scale_bytes(scales), np.packbits(plus.cpu().numpy(), bitorder="little")])
        return raw.to(x.device), _signed(plus, scales)

    def decode(self, payload: Tensor, n: int) -> Tensor:
        raw, blocks = _opened(payload, *self.limits(n)), _blocks(n)
        scales = _read_scales(raw[: 2 * blocks])
        plus = np.unpackbits(raw[2 * blocks :], count=n, bitorder="little").view(bool)
        return _signed(torch.from_numpy(plus).to(payload.device), scales.to(payload.device))

    def limits(self, n: int) -> tuple[int, int]:
        size = _DIGEST + 2 * _blocks(n) + -(-n // 8)
        return size, size


class EntropyVector:
    """About `bits` bits a value; below 1 most values are 0, and what they cost is what the others leave."""

    def __init__(self, bits: float):
        self.bits = bits
        # where |q| turns from 0 to 1: few bits are spent best on large values. On normal and Laplace values of 0.1 to 4
        # bits this is within 3 % of the squared error of the best offset with centroids
        self.offset = 0.5 - 0.2 / max(1.0, bits)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = _means(x.square()).sqrt_().bfloat16().float()
        inverse = torch.where(scales > 0, 1 / scales, 0.0)
        relative = _scaled(x.abs(), inverse)
        step = self._step(relative)
        q = self._whole(relative, step)
        magnitude = q.to(torch.int32).cpu().numpy()
        sent, writer = _sent(magnitude, scales), WordWriter()
        nonzero = (magnitude != 0).nonzero()[0]
        counts = _counts(magnitude.take(nonzero), sent.size)
        writer.put(sent, counts)
        words = writer.words()
        head = _HEAD.pack(step, counts.size)
        signs = np.packbits((x < 0).cpu().numpy().take(nonzero), bitorder="little")
        parts = [
            np.frombuffer(head, np.uint8),
            counts,
            np.array([words.size], "<u4"),
            words,
            _scale_bytes(scales),
            signs,
        ]
        # nothing sent is +0, as for who decodes: beside a weight of -0 the other zero would be another result
        return _sealed(parts).to(x.device), _scaled(q.copysign_(x).add_(0.0), scales * step)

    def decode(self, payload: Tensor, n: int) -> Tensor:
        raw, blocks = _opened(payload, *self.limits(n)), _blocks(n)
        step, symbols = _HEAD.unpack(raw[: _HEAD.size].tobytes())
        if not (math.isfinite(step) and step > 0 and 2 <= symbols <= LEVELS + 1):
            raise ValueError(f"step {step} and symbols {symbols}: the payload is damaged")
        counts, raw = _taken(raw[_HEAD.size :], symbols, "<u2", "counts")
        size, raw = _taken(raw, 1, "<u4", "count of words")
        words, raw = _taken(raw, int(size[0]), "<u4", "words")
        scales = _read_scales(raw[: 2 * blocks])
        reader = WordReader(words)
        magnitude = _received(lambda m: reader.take(m, counts, small=self.bits < NEAR_ZERO), scales, n)
        reader.finish()
        nonzero, signs = (magnitude != 0).nonzero()[0], raw[2 * blocks :]
        if signs.size != -(-nonzero.size // 8):
            raise ValueError(f"signs: {signs.size} bytes for {nonzero.size} values: the payload is damaged")
        negative = np.unpackbits(signs, count=nonzero.size, bitorder="little").view(bool)
        magnitude[nonzero[negative]] *= -1
        q = torch.from_numpy(magnitude).to(payload.device).float()
        return _scaled(q, scales.to(payload.device) * step)

    def limits(self, n: int) -> tuple[int, int]:
        least = _DIGEST + _HEAD.size + 4 + 4 + 2 * _blocks(n)
        return least, least + 2 * (LEVELS - 1) + 4 * n + n // 8 + 64  # a symbol of least probability: below 32 bits

    def _whole(self, magnitude: Tensor, step: float) -> Tensor:
        """In their place."""
        return magnitude.div_(step).add_(self.offset).floor_().clamp_(max=self._most(step))

    def _most(self, step: float) -> int:
        return min(LEVELS, math.ceil(FARTHEST / step))

    def _step(self, relative: Tensor) -> float:
        """Of the magnitudes in units of their block's rms [n]: the smallest step that asks for no more than `bits`."""
        blocks = _blocks(relative.numel())
        chosen = torch.linspace(0, max(0, blocks - 1), min(blocks, TRIED)).long().tolist()
        tried = torch.cat([relative[b * BLOCK : (b + 1) * BLOCK] for b in chosen]) if chosen else relative
        ordered, n = np.sort(tried.cpu().numpy()), max(1, relative.numel())
        low, high = -7.0, 7.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            fits = _bits(self._histogram(ordered, 2.0**middle), n) <= self.bits
            low, high = (low, middle) if fits else (middle, high)
        return float(np.float32(2.0**high))

    def _histogram(self, ordered: np.ndarray, step: float) -> np.ndarray:
        """How many of the magnitudes [m], smallest first, become 0, 1, 2 … steps: what counting `_whole` gives."""
        edges = (np.arange(1, self._most(step) + 1) - self.offset) * step
        ends = np.searchsorted(ordered, edges.astype(np.float32))
        return np.append(ends, ordered.size) - np.append(0, ends)


def _bits(counts: np.ndarray, n: int) -> float:
    """Bits a value of n values whose magnitudes 0, 1, 2 … are as frequent as these: at -log2 p, with signs and scales.

    Without what a payload has once: few values must get their bits too.
    """
    share = counts / max(1, counts.sum())
    entropy = -float((share * np.log2(np.maximum(share, 1e-300))).sum()) + 1 - float(share[0])
    return entropy + 16 * _blocks(n) / n


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def _means(values: Tensor) -> Tensor:
    """Of `values` [n] in each block, float32 [blocks]. Raises ValueError if one is not finite."""
    whole, rest = _in_blocks(values)
    means = whole.sum(1) / BLOCK
    if rest.numel():
        padded = torch.nn.functional.pad(rest, (0, BLOCK - rest.numel()))
        means = torch.cat([means, padded.view(1, BLOCK).sum(1) / rest.numel()])
    if not means.isfinite().all():
        raise ValueError("a vector to be coded holds a NaN, an infinity, or a square beyond float32")
    return means


def _in_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Views of whole blocks, [blocks, BLOCK], and of what is left, [fewer than BLOCK]."""
    end = values.numel() // BLOCK * BLOCK
    return values[:end].view(-1, BLOCK), values[end:]


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """`values` [n], in their place, each times its block's scale."""
    whole, rest = _in_blocks(values)
    whole.mul_(scales[: len(whole), None])
    rest.mul_(scales[len(whole) :])
    return values


def _signed(plus: Tensor, scales: Tensor) -> Tensor:
    return _scaled(torch.where(plus, 1.0, -1.0), scales)


def _sent(magnitude: np.ndarray, scales: Tensor) -> np.ndarray:
    """What is coded of them: the values of blocks that are not all zero."""
    there = scales.cpu().numpy() > 0
    return magnitude if there.all() else magnitude[np.repeat(there, BLOCK)[: magnitude.size]]


def _received(take: Callable[[int], np.ndarray], scales: Tensor, n: int) -> np.ndarray:
    """n magnitudes of which `_sent` has coded those that it does; `take`: the next so many, int32."""
    blocks = scales.cpu().numpy() > 0
    if n and blocks.all():
        return take(n)
    there = np.repeat(blocks, BLOCK)[:n]
    magnitude, count = np.zeros(n, np.int32), int(there.sum())
    if count:
        magnitude[there] = take(count)
    return magnitude


def _scale_bytes(scales: Tensor) -> np.ndarray:
    return to_bf16(scales.cpu().numpy()).astype("<u2")


def _read_scales(raw: np.ndarray) -> Tensor:
    scales = torch.from_numpy(from_bf16(raw.copy().view("<u2").astype(np.uint16)))
    if not (scales.isfinite() & (scales >= 0)).all():
        raise ValueError("scales: one is negative or not finite: the payload is damaged")
    return scales


def _sealed(parts: list[np.ndarray]) -> Tensor:
    body = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts])
    digest = np.frombuffer(xxhash.xxh3_64_intdigest(body.data).to_bytes(_DIGEST, "little"), np.uint8)
    return torch.from_numpy(np.concatenate([digest, body]))


def _opened(payload: Tensor, least: int, most: int) -> np.ndarray:
    """What lies under the digest, uint8."""
    if payload.dtype != torch.uint8 or payload.ndim != 1 or not least <= payload.numel() <= most:
        raise ValueError(f"a payload is {least} to {most} bytes, not {payload.dtype} {tuple(payload.shape)}")
    raw = payload.cpu().numpy()
    if xxhash.xxh3_64_intdigest(raw[_DIGEST:].data) != int.from_bytes(raw[:_DIGEST].tobytes(), "little"):
        raise ValueError("digest: the payload was damaged on its way")
    return raw[_DIGEST:]


def _taken(raw: np.ndarray, count: int, dtype: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` numbers of raw, and the rest."""
    size = count * np.dtype(dtype).itemsize
    if size > raw.size:
        raise ValueError(f"{field}: {count} do not fit in {raw.size} bytes: the payload is damaged")
    return raw[:size].copy().view(dtype), raw[size:]


def _counts(nonzero: np.ndarray, size: int) -> np.ndarray:
    """How often each of `size` magnitudes occurs, given those that are not 0, in 65,535ths, u16: what occurs at all has one."""
    counts = np.bincount(nonzero, minlength=2)
    counts[0] = size - nonzero.size
    share = np.round(counts * (65_535 / max(1, size)))
    return np.where(counts > 0, np.clip(share, 1, 65_535), 0).astype("<u2")
