"""What a file holds, as a name."""

from __future__ import annotations

from pathlib import Path

import xxhash

_PIECE = 1 << 24


def file_digest(file: Path) -> str:
    """xxh3-128 of its bytes, hexadecimal; a piece of 16 MiB in memory at a time."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as f:
        while piece := f.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
