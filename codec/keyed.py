"""Random numbers that both ends of a link draw from a key of each row, so that nothing of them is sent.

A key says which row it is: in which tick, of which sample, at which place. No generator moves from call to call, so a
pass that is made again draws the same, whatever was drawn between, in a tick that is taken again as after a restart. And
a sample is known by its tokens: on whichever replica and in whichever microbatch it is, its rows have the same keys.
All of it is integer arithmetic modulo 2^64, so a CPU and a GPU draw alike.

References: Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11, for generators without a
state; Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA, for `mix`.
"""

from __future__ import annotations

import struct
from collections import Counter

import numpy as np
import torch
import xxhash
from jaxtyping import Float32, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, and its multiples are far apart
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_UNIFORM_BITS = 23  # of a uniform number: exact in fp32, its half step too


def mix(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """A bijection of 64 bits in which every bit of the result depends on every bit of x."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift of an int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def row_keys(ids: np.ndarray, real: np.ndarray, tick: int) -> np.ndarray:
    """Tokens [B, L] and the mask of real ones -> a key for each real token in packed order, int64 [N].

    Samples that are equal as a whole are told apart by which of them it is in its microbatch.
    """
    seen, starts = Counter[bytes](), np.empty(len(ids), np.uint64)
    for b, row in enumerate(ids):
        tokens = row[real[b]].tobytes()
        starts[b] = xxhash.xxh3_64_intdigest(struct.pack("<qq", tick, seen[tokens]) + tokens)
        seen[tokens] += 1
    sample, place = np.nonzero(real)
    return (starts[sample] + place.astype(np.uint64) * np.uint64(_GOLDEN % (1 << 64))).view(np.int64)


def coordinates(keys: Int64[Tensor, " n"], hidden: int, k: int) -> Int64[Tensor, "n k"]:
    """For each key k of `hidden` coordinates, every set of k as likely as any other.

    The first k swaps of a shuffle (Fisher and Yates), in all rows at once: 20 times as fast as the k largest of random numbers.
    """
    free = torch.arange(hidden, hidden - k, -1, device=keys.device)
    chosen = (_drawn(keys, k) & 0xFFFFFFFF) * free >> 32  # of those that are left; uneven by 2^-32
    chosen += torch.arange(k, device=keys.device)
    order = torch.arange(hidden, dtype=torch.int32, device=keys.device).repeat(len(keys), 1)
    for i in range(k):
        here, there = order[:, i : i + 1].clone(), chosen[:, i : i + 1]
        order[:, i : i + 1] = order.gather(1, there)
        order.scatter_(1, there, here)
    return order[:, :k].long()


def centred_uniforms(keys: Int64[Tensor, " n"], k: int) -> Float32[Tensor, "n k"]:
    """For each key k numbers, uniform in (-1/2, 1/2) and of mean 0 exactly."""
    whole = _shifted(_drawn(keys, k), 64 - _UNIFORM_BITS)
    return (whole.float() + 0.5) * 2.0**-_UNIFORM_BITS - 0.5


def _drawn(keys: Int64[Tensor, " n"], k: int) -> Int64[Tensor, "n k"]:
    """For each key k numbers of 64 random bits."""
    return mix(mix(keys)[:, None] + _GOLDEN * torch.arange(1, k + 1, device=keys.device))
