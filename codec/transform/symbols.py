"""The alphabet of magnitudes: small ones are symbols themselves, large ones a symbol and plain bits.

|q|      0 … 15   16–23  24–31  32–47  48–63   …  up to 2^31
symbol   0 … 15     16     17     18     19    …  two for each octave
plain       –      3 bits 3 bits 4 bits 4 bits …  the rest of |q|, which is about uniform there
"""

from __future__ import annotations

import numpy as np

_DIRECT_BITS = 4
DIRECT = 1 << _DIRECT_BITS
MAGNITUDE_BITS = 31  # of a magnitude
SYMBOLS = DIRECT + 2 * (MAGNITUDE_BITS - _DIRECT_BITS)

# 2^octave <= |q| of each symbol from DIRECT up, and the next
_OCTAVES = np.arange(SYMBOLS - DIRECT + 1) // 2 + _DIRECT_BITS
LOW_BITS = _OCTAVES - 1  # plain bits of each
_SMALLEST = (2 + np.arange(_OCTAVES.size) % 2) << LOW_BITS  # magnitude of each


def symbols_of(magnitude: np.ndarray) -> np.ndarray:
    """Magnitudes below 2^MAGNITUDE_BITS, int32 [m] -> symbols, int32 [m]."""
    large = (magnitude >= DIRECT).nonzero()[0]
    symbol = magnitude.copy()
    if large.size:
        symbol[large] = _SMALLEST.searchsorted(magnitude[large], "right") + (DIRECT - 1)
    return symbol


def plain_bits(symbol: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols from DIRECT up, int [m] -> (smallest magnitude of each, plain bits of each), int64 [m]."""
    at = symbol - DIRECT
    return _SMALLEST.take(at), LOW_BITS.take(at)


def pack_bits(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The low `lengths` [m] bits of `values` [m], one after the other, lowest first -> uint8."""
    which, place = _places(lengths)
    return np.packbits((values[which] >> place & 1).astype(np.uint8), bitorder="little")


def unpack_bits(packed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Inverse of `pack_bits`, int64 [m]. The caller has checked that `packed` has the right size."""
    which, place = _places(lengths)
    values = np.zeros(lengths.size, np.int64)
    np.add.at(values, which, np.unpackbits(packed, count=which.size, bitorder="little").astype(np.int64) << place)
    return values


def _places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each bit: which value it belongs to, and its place there."""
    which = np.repeat(np.arange(lengths.size), lengths)
    starts = np.cumsum(lengths) - lengths
    return which, np.arange(which.size) - starts[which]
