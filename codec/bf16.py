"""Float32 weights as the bit patterns of bf16, and back; of many weights in machine code."""

from __future__ import annotations

import numpy as np

from codec.planes import COMPILED_FROM

LANES = 16  # of `codec/machine_code.py`, which is imported where there is enough to do
_IN_CACHE = 1 << 16  # elements


def compiled_part(size: int) -> int:
    """How many of so many weights are machine code's: none of few, and else all but the last that fill no vector."""
    return size // LANES * LANES if size >= COMPILED_FROM else 0


def to_bf16(weights: np.ndarray) -> np.ndarray:
    """float32 [n] -> bf16 bit patterns, uint16 [n]. Rounds to nearest even as torch does; a NaN becomes quiet."""
    if weights.dtype != np.float32:
        raise TypeError(f"only float32 is rounded to bf16, not {weights.dtype}")
    weights = np.ascontiguousarray(weights)
    bits, patterns, whole = weights.view(np.uint32), np.empty(weights.size, np.uint16), compiled_part(weights.size)
    if whole:
        from codec.delta_loops import round_into

        round_into(patterns[:whole], weights[:whole])
    for first in range(whole, bits.size, _IN_CACHE):  # whole arrays in between would be the largest of a process
        part = slice(first, first + _IN_CACHE)
        patterns[part] = _rounded(bits[part])
    return patterns


def from_bf16(patterns: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """bf16 bit patterns, uint16 [n] -> float32 [n], exact; `into` these, which lie in a row."""
    if patterns.dtype != np.uint16:
        raise TypeError(f"bf16 bit patterns are uint16, not {patterns.dtype}")
    weights = np.empty(patterns.shape, np.float32) if into is None else into
    whole = compiled_part(patterns.size)
    if whole:
        from codec.delta_loops import widen_into

        widen_into(weights[:whole], np.ascontiguousarray(patterns[:whole]))
    weights.view(np.uint32)[whole:] = patterns[whole:].astype(np.uint32) << 16
    return weights


def _rounded(bits: np.ndarray) -> np.ndarray:
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(bits.view(np.float32))
    if nan.any():  # rounding up may have carried their mantissa into the sign
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded
