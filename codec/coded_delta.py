"""Weights in few bits: the coded difference from what a receiver holds, added to that on both ends.

    new - held ─▶ codec.vector, PIECE by PIECE ─▶ held += what was decoded, the same bits on both ends

What one step loses is in the next difference: the error feeds back by itself, and nothing else is kept. Arrays:

    base, result   uint8 [16]      xxh3-128 of what is held before and after, float32
    sizes          int64 [pieces]  bytes of each payload
    coded          uint8 [n]       the payloads, one after the other

Digests guard against corruption and mix-ups, not against an adversary; `codec/delta.py` is the lossless way.
"""

from __future__ import annotations

import numpy as np
import torch

from codec.delta import BaseMismatch, digest_row
from codec.vector import VectorCoder

PIECE = 1 << 22  # weights that are coded at a time: their temporaries are ten times as large
_DTYPES = {"base": np.uint8, "result": np.uint8, "sizes": np.int64, "coded": np.uint8}


def encode(new: np.ndarray, held: np.ndarray, coder: VectorCoder) -> dict[str, np.ndarray]:
    """Weights float32 [n] -> arrays for a frame; `held` float32 [n] becomes what its receivers then hold.

    Raises ValueError if a weight is not finite.
    """
    arrays, payloads = {"base": digest_row(held)}, [np.zeros(0, np.uint8)]
    for start in range(0, len(held), PIECE):
        part = held[start : start + PIECE]
        payload, decoded = coder.encode(torch.from_numpy(new[start : start + PIECE] - part))
        payloads.append(payload.numpy())
        part += decoded.numpy()
    sizes = np.array([payload.size for payload in payloads[1:]], np.int64)
    return arrays | {"result": digest_row(held), "sizes": sizes, "coded": np.concatenate(payloads)}


def decode(arrays: dict[str, np.ndarray], held: np.ndarray, coder: VectorCoder) -> np.ndarray:
    """Arrays of `encode`, and what is held, float32 [n] -> what is held from now on, float32 [n].

    Raises BaseMismatch if they are for other weights than `held`, and ValueError naming the field if they are damaged.
    """
    _check(arrays)
    sizes, coded, starts = arrays["sizes"], arrays["coded"], range(0, len(held), PIECE)
    if len(sizes) != len(starts) or (sizes < 0).any() or sum(sizes.tolist()) != coded.size:
        raise _bad("sizes", f"{len(sizes)} pieces in {coded.size} bytes, {len(held)} weights are {len(starts)}")
    if not np.array_equal(arrays["base"], digest_row(held)):
        raise BaseMismatch(
            f"a step from {arrays['base'].tobytes().hex()} came, held is {digest_row(held).tobytes().hex()}"
        )
    found, end = held.copy(), 0
    for start, size in zip(starts, sizes.tolist()):
        part, end = found[start : start + PIECE], end + size
        try:
            part += coder.decode(torch.from_numpy(coded[end - size : end].copy()), len(part)).numpy()
        except ValueError as error:
            raise _bad("coded", str(error)) from error
    if not np.array_equal(arrays["result"], digest_row(found)):
        sent, here = arrays["result"].tobytes().hex(), digest_row(found).tobytes().hex()
        raise _bad("result", f"{sent} was sent, what was decoded has {here}")
    return found


def _check(arrays: dict[str, np.ndarray]) -> None:
    """Names, dtypes and shapes are those of `encode`."""
    if set(arrays) != set(_DTYPES):
        odd = sorted(set(arrays) ^ set(_DTYPES))[0]
        raise _bad(odd, "missing" if odd in _DTYPES else f"does not belong beside {sorted(_DTYPES)}")
    for name, array in arrays.items():
        shape = (16,) if name in ("base", "result") else (array.size,)
        if array.dtype != _DTYPES[name] or array.shape != shape:
            raise _bad(name, f"is {array.dtype} {array.shape}, not {np.dtype(_DTYPES[name])} {shape}")


def _bad(field: str, reason: str) -> ValueError:
    return ValueError(f"coded delta field {field!r}: {reason}")
