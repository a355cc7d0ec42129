"""A sum over replicas in few bits, the same on all of them to the bit: a ring all-reduce whose two halves are coded.

    x of this replica ─▶ a chunk for each replica ─encode─▶ scatter ─▶ owner of a chunk: decode, add in the order of replicas
    sum of a chunk    ─encode─▶ gather ─▶ every replica: decode

Each replica sends 2(n-1)/n of a coded vector, as a ring does of a dense one; an all-gather of coded vectors would send (n-1), and
would not gain on a dense ring beyond 64 / bits replicas. What a replica has lost of its own, and the owner of a chunk on its sum,
comes back to whoever must send it again: over all replicas what is lost and what arrived is what was put in. Few values have fewer
owners: coding them takes a time that is the same for any number of values.

Reference: Tang et al. 2021, "1-bit Adam", arXiv:2102.02888, section 4.3 (compressed_allreduce, with errors of worker and server).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from codec.costs import owners
from codec.vector import VectorCoder


class Replicas(Protocol):
    """Those who sum a gradient, this one being number `index` of `count`. Every method is called by all of them."""

    count: int
    index: int

    def sum(self, tensor: Tensor, dense_bytes: float) -> None:
        """In place; bit-identical on all. `dense_bytes`: of what a dense system sums for it."""
        ...

    def scatter(self, payloads: list[Tensor], least: int, most: int, dense_bytes: float) -> list[Tensor]:
        """Flat uint8 payload k to replica k -> what came from each, in order; this one's own is handed back.

        Whatever comes has `least` to `most` bytes. Raises if it has not.
        """
        ...

    def gather(self, payload: Tensor, limits: list[tuple[int, int]]) -> list[Tensor]:
        """One flat uint8 payload to all -> those of all, in order; that of replica k has limits[k] bytes, least and most."""
        ...


def coded_sum(x: Tensor, coder: VectorCoder, replicas: Replicas, dense_bytes: float) -> tuple[Tensor, Tensor]:
    """float32 [n] -> (sum over replicas as all of them hold it, what of it this one must send again), both [n].

    Raises ValueError for a payload that is damaged.
    """
    chunks, k = _chunks(x.numel(), replicas.count), replicas.index
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    total, lost = torch.empty_like(x), torch.zeros_like(x)
    nothing, payloads = x.new_empty(0, dtype=torch.uint8), []
    for j, chunk in enumerate(chunks):
        payload, decoded = coder.encode(x[chunk]) if j != k and lengths[j] else (nothing, x[chunk])
        payloads.append(payload)
        lost[chunk] = x[chunk] - decoded
    limits = [coder.limits(n) if n else (0, 0) for n in lengths]
    came = replicas.scatter(payloads, *limits[k], dense_bytes)
    payload, decoded = nothing, x[chunks[k]]
    if lengths[k]:
        parts = [x[chunks[k]] if j == k else coder.decode(payload, lengths[k]) for j, payload in enumerate(came)]
        mine = parts[0].clone()
        for part in parts[1:]:
            mine += part
        payload, decoded = coder.encode(mine)
        lost[chunks[k]] = mine - decoded
    for j, raw in enumerate(replicas.gather(payload, limits)):
        if lengths[j]:
            total[chunks[j]] = decoded if j == k else coder.decode(raw, lengths[j])
    return total, lost


def _chunks(n: int, count: int) -> list[slice]:
    """Who owns what: n values in runs of nearly equal length for the first `owners`, and nothing for the others."""
    among = owners(n, count)
    ends = [min(n, n * j // among) for j in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]
