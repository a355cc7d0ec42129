"""What crosses a boundary, by codec: shared by `plan` and `simulate`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from codec.config import CodecConfig

FP32, BF16 = 4, 2
DIRECTIONS = 0.6  # share of the directions that a transform's tables hold: 0.4 to 0.85 were seen at 5 % of two models


@dataclass(frozen=True)
class Crossing:
    """Bytes at one boundary. Exact for `none` and `powersgd` as published; of a transform the total is, held by its rate."""

    forward: float  # of a token
    backward: float
    ways: int  # that have tables of their own
    tables: float  # of one way, each time they are sent
    statistics: float  # of one way, as they are summed over replicas
    once: bool  # the tables are sent about once a run, not at every refresh


def crossing(codec: CodecConfig, hidden: int, itemsize: int, tokens: float, sample: float) -> Crossing:
    """For numbers of `itemsize` bytes, `tokens` a replica sends through a way in the whole run, samples of mean length.

    Raises ValueError for somebody else's codec: only a run can tell its bytes.
    """
    if codec.kind == "none":
        dense = float(hidden * itemsize)
        return Crossing(dense, dense, 0, 0.0, 0.0, False)
    if codec.kind == "powersgd":
        rank = codec.rank_for(hidden)
        sketch, basis = float(rank * itemsize), FP32 * hidden * rank
        exact = (BF16 * hidden - sketch) / sample if codec.sends_first_exactly else 0.0
        return Crossing(sketch + exact, sketch, 2 if codec.backward_basis == "own" else 1, basis, basis, False)
    if codec.kind == "transform":
        forward, backward = (BF16 * hidden * rate for rate in codec.rates)
        tables = hidden * (DIRECTIONS * (hidden + 8) + 2)
        statistics = FP32 * (1 + hidden + hidden * (hidden + 1) / 2)
        side = tables / tokens  # the first ones travel with a payload, and all are paid from the rate
        return Crossing(max(forward - side, 0), max(backward - side, 0), 2, tables, statistics, True)
    raise ValueError(f"codec.kind {codec.kind!r} is your own: what it sends is known only by running it")
