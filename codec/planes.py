"""Planes of bytes, compressed where that makes them smaller.

A plane of its full size travels as it is, a shorter one is a zstd frame: the receiver always knows the
full size, so no flag is needed, and no frame can make it allocate more.
"""

from __future__ import annotations

import numpy as np
import zstandard

COMPILED_FROM = 1 << 19  # signs: fewer are packed and merged by whole arrays before LLVM is loaded


def shrink(plane: np.ndarray, level: int = 1) -> np.ndarray:
    """uint8 [n], contiguous -> uint8 [at most n]: a zstd frame if that is shorter, else the plane itself."""
    packed = zstandard.ZstdCompressor(level=level).compress(plane.data)
    return np.frombuffer(packed, np.uint8) if len(packed) < plane.size else plane


def expand(stored: np.ndarray, size: int, name: str) -> np.ndarray:
    """What `shrink` gave -> the plane, uint8 [size].

    Raises ValueError naming `name`. A frame that states another size is refused before anything is
    allocated for it.
    """
    if stored.dtype != np.uint8 or stored.ndim != 1:
        raise ValueError(f"{name}: is {stored.dtype} {stored.shape}, not a row of uint8")
    if stored.size == size:
        return stored
    if stored.size > size:
        raise ValueError(f"{name}: {stored.size} bytes for a plane of {size}")
    data = np.ascontiguousarray(stored).data
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != size:
            raise ValueError(f"{name}: expands to {stated} bytes, the plane has {size}")
        # zstd itself stops at the size its frame states
        plane = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"{name}: not a zstd frame of {size} bytes ({error})") from error
    return np.frombuffer(plane, np.uint8)
