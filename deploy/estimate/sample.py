"""Some of a model's weights, spread over all of its parts: what `plan` measures the size of snapshots on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploy.estimate.parameters import Params
from rl.stored_weights import Stored, stored_weights

KINDS = ("embedding", "layer", "head")  # in the order of a snapshot
SCALE = 0.02  # of normal weights, where the model's own are not at hand


@dataclass(frozen=True)
class Sample:
    """n weights with the part of the model that they are of."""

    weights: np.ndarray  # fp32 [n]
    table: np.ndarray  # bool [n]: of the embedding
    head: np.ndarray  # bool [n]: of the head; if tied, of the embedding
    own: bool  # the model's, not made up


def sample_weights(path: str, params: Params, pieces: int, length: int) -> Sample:
    """`pieces` pieces of `length` weights, evenly spaced; all weights if there are no more."""
    stored = [] if params.beneath else stored_weights(path)
    if not stored:
        return _made_up(params, min(params.total, pieces * length))
    cut = _cut(stored, pieces, length)
    weights = np.concatenate([tensor.read(start, stop) for tensor, start, stop in cut])
    kinds = [np.full(stop - start, KINDS.index(tensor.kind), np.int8) for tensor, start, stop in cut]
    return _sample(params, weights, np.concatenate(kinds), own=True)


def _made_up(params: Params, n: int) -> Sample:
    weights = np.random.default_rng(0).standard_normal(n, np.float32) * np.float32(SCALE)
    table, head = (round(n * part / params.total) for part in (params.embedding, params.head))
    return _sample(params, weights, np.repeat(np.arange(3, dtype=np.int8), [table, n - table - head, head]), own=False)


def _sample(params: Params, weights: np.ndarray, kinds: np.ndarray, own: bool) -> Sample:
    """`kinds` [n]: each weight's place in KINDS."""
    table, head = (kinds == KINDS.index(kind) for kind in ("embedding", "head"))
    return Sample(weights, table, table if params.tied else head, own)


def _cut(stored: list[Stored], pieces: int, length: int) -> list[tuple[Stored, int, int]]:
    """(tensor, start, stop) of each piece; one that would reach beyond its tensor begins earlier."""
    ends = np.cumsum([tensor.size for tensor in stored])
    if ends[-1] <= pieces * length:
        return [(tensor, 0, tensor.size) for tensor in stored]
    found = []
    for at in (np.arange(pieces) + 0.5) / pieces * ends[-1]:
        i = int(np.searchsorted(ends, at, side="right"))
        tensor = stored[i]
        start = max(0, min(int(at - ends[i]) + tensor.size, tensor.size - length))
        found.append((tensor, start, min(tensor.size, start + length)))
    return found
