"""What a codec costs, by arithmetic. `plan`, `simulate`, `probe` and `doctor` ask here: nobody else looks at a kind. No torch.

A codec of the user's own brings its own: the function that `codec.kind` names has an attribute `cost`, a function too:

    def halved(config, hidden, seed): ...

    def cost(config: CodecConfig, shape: BoundaryShape, tokens: Tokens) -> CodecCost:
        return CodecCost("float16", forward=2 * shape.hidden, backward=2 * shape.hidden, dense=shape.dense)

    halved.cost = cost
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log, prod, sqrt
from typing import cast

from codec.config import CodecConfig, GradientConfig
from codec.named import imported

FP32, BF16 = 4, 2
DIRECTIONS = 0.6  # share of the directions that a transform's tables hold: 0.4 to 0.85 were seen at 5 % of two models
SCALED = 512  # values that share a scale of two bytes: `codec.vector`
SMALLEST = 8 * SCALED  # values of a chunk of a coded sum, where there is more than one: `codec.coded_sum`
BOOKS = 5 * 8  # bytes of what a way with a held rate sent in a tick, float64: `codec.transform.rate`


@dataclass(frozen=True)
class BoundaryShape:
    """What crosses a boundary without codec."""

    hidden: int
    itemsize: int  # bytes of a number, in the model's dtype

    @property
    def dense(self) -> float:
        """Bytes of a token."""
        return float(self.hidden * self.itemsize)


@dataclass(frozen=True)
class Tokens:
    """What one replica passes through one way of a boundary."""

    run: float  # tokens in the whole run
    sample: float  # tokens of a sample, mean


@dataclass(frozen=True)
class CodecCost:
    """Bytes at one boundary. Exact but for shared prefixes; of a transform the total is, held by its rate."""

    name: str  # as a table shows it
    forward: float  # of a token
    backward: float
    dense: float  # of a token of the dense system that its rates are shares of
    ways: int = 0  # that have tables of their own
    tables: float = 0.0  # of one way, each time they are sent
    statistics: float = 0.0  # of one way, as they are summed over replicas
    once: bool = False  # the tables are sent about once a run, not at every refresh
    books: float = 0.0  # of one way, summed over replicas in every tick to hold its rate


Cost = Callable[[CodecConfig, BoundaryShape, Tokens], CodecCost]


def codec_cost(config: CodecConfig, shape: BoundaryShape, tokens: Tokens) -> CodecCost:
    """Raises ValueError for a codec that cannot be imported, does not say what it costs, or does not fit the shape."""
    if config.kind in COSTS:
        return COSTS[config.kind](config, shape, tokens)
    own = _own_cost(config.kind, "codec.kind", "(config, shape, tokens) -> codec.costs.CodecCost")
    return cast(Cost, own)(config, shape, tokens)


def _own_cost(kind: str, setting: str, signature: str) -> object:
    """The function that a user's kind has for its cost. Raises ValueError."""
    cost = getattr(imported(kind, setting), "cost", None)
    if cost is None:
        raise ValueError(
            f"{setting} {kind!r} does not say what it costs: give it an attribute `cost`, a function {signature}"
        )
    return cost


def _none(config: CodecConfig, shape: BoundaryShape, tokens: Tokens) -> CodecCost:
    return CodecCost("none", shape.dense, shape.dense, shape.dense)


def _powersgd(config: CodecConfig, shape: BoundaryShape, tokens: Tokens) -> CodecCost:
    rank, own = config.rank_for(shape.hidden), config.backward_basis == "own"
    sketch, basis = float(rank * shape.itemsize), float(FP32 * shape.hidden * rank)
    exact = (BF16 * shape.hidden - sketch) / tokens.sample if config.sends_first_exactly else 0.0
    return CodecCost(
        name=f"powersgd r={rank}" + (", own basis for dX" if own else ""),
        forward=sketch + exact,
        backward=sketch,
        dense=shape.dense,
        ways=2 if own else 1,
        tables=basis,
        statistics=basis,
    )


def _random_k(config: CodecConfig, shape: BoundaryShape, tokens: Tokens) -> CodecCost:
    # values go in bf16, whatever the model's dtype
    k, dense = config.rank_for(shape.hidden), float(BF16 * shape.hidden)
    exact = (dense - BF16 * k) / tokens.sample if config.sends_first_exactly else 0.0
    return CodecCost(f"random_k k={k}", forward=BF16 * k + exact, backward=float(BF16 * k), dense=dense)


def _transform(config: CodecConfig, shape: BoundaryShape, tokens: Tokens) -> CodecCost:
    hidden, dense = shape.hidden, float(BF16 * shape.hidden)  # its rates are shares of bf16, whatever the model's dtype
    tables = hidden * (DIRECTIONS * (hidden + 8) + 2)
    side = tables / tokens.run  # the first ones travel with a payload, and all are paid from the rate
    forward, backward = config.rates
    return CodecCost(
        name=f"transform {config.coder}{' dither' if config.dither else ''} {100 * forward:g} / {100 * backward:g} %",
        forward=max(dense * forward - side, 0),
        backward=max(dense * backward - side, 0),
        dense=dense,
        ways=2,
        tables=tables,
        statistics=FP32 * (1 + hidden + hidden * (hidden + 1) / 2),
        once=True,
        books=BOOKS,
    )


COSTS: dict[str, Cost] = {"none": _none, "powersgd": _powersgd, "random_k": _random_k, "transform": _transform}


# --- the gradient's sum over replicas ----------------------------------------------------------------

Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class GradientCost:
    """Of one stage with parameters of these shapes, on each of its replicas."""

    sent: float  # bytes that are summed, before the ring's factor
    sums: int  # one after the other
    kept: int  # bytes kept from tick to tick: error feedback
    coded: int = 0  # how many of the sums are coded: sizes travel before their payloads


GradientCosts = Callable[[GradientConfig, Shapes, int], GradientCost]


def gradient_cost(config: GradientConfig, shapes: Shapes, copies: int) -> GradientCost:
    """Of parameters of these shapes that so many ranks sum.

    Raises ValueError for a kind that cannot be imported, or does not say what it costs.
    """
    if config.kind in GRADIENTS:
        return GRADIENTS[config.kind](config, shapes, copies)
    signature = "(config, shapes, copies) -> codec.costs.GradientCost"
    return cast(GradientCosts, _own_cost(config.kind, "codec.gradient.kind", signature))(config, shapes, copies)


def _dense_sum(config: GradientConfig, shapes: Shapes, copies: int) -> GradientCost:
    return GradientCost(FP32 * sum(map(prod, shapes)), sums=1, kept=0)


def _powersgd_sum(config: GradientConfig, shapes: Shapes, copies: int) -> GradientCost:
    factored = [shape for shape in shapes if is_factored(shape, config.rank)]
    ranks = [min(config.rank, *shape) for shape in factored]
    whole = sum(prod(shape) for shape in shapes if not is_factored(shape, config.rank))
    first = whole + sum(r * rows for r, (rows, _) in zip(ranks, factored))  # P, with what is not factored beside it
    second = sum(r * columns for r, (_, columns) in zip(ranks, factored))
    kept = FP32 * sum(map(prod, shapes))
    if config.bits is None:
        return GradientCost(FP32 * (first + second), sums=2, kept=kept)
    sent = sum(_entropy_coded(n, config.bits, copies) for n in (first, second) if n)
    return GradientCost(sent, sums=2, kept=kept, coded=bool(first) + bool(second))


def _sign_sum(config: GradientConfig, shapes: Shapes, copies: int) -> GradientCost:
    n = sum(map(prod, shapes))
    chunks = owners(n, copies)
    chunk = ceil(n / chunks)
    return GradientCost(chunks * (8 + 2 * ceil(chunk / SCALED) + ceil(chunk / 8)), sums=1, kept=FP32 * n, coded=1)


def _sparse_sum(config: GradientConfig, shapes: Shapes, copies: int) -> GradientCost:
    assert config.bits is not None  # the config asks for it
    n = sum(map(prod, shapes))
    return GradientCost(_entropy_coded(n, config.bits, copies), sums=1, kept=FP32 * n, coded=1)


def _entropy_coded(n: int, bits: float, copies: int) -> float:
    """Bytes of n values, a chunk for each owner: at their bits, and what a payload of `codec.vector` has once.

    Of normal values: at 2 bits and more in steps of about 4·2^-bits of their deviation, the largest of m at √(2 ln m) of it,
    and one deviation farther, as the columns of a factor differ in theirs.
    """
    chunks = owners(n, copies)
    step, farthest = min(2.5, 4 * 2**-bits), 1 + sqrt(2 * log(max(2, n / chunks)))
    return bits / 8 * n + chunks * (22 + 2 * (2 + farthest / step))


def owners(n: int, copies: int) -> int:
    """Of so many replicas, how many sum a chunk of n coded values: a chunk below SMALLEST costs more time than it saves."""
    return min(copies, max(1, n // SMALLEST))


def is_factored(shape: tuple[int, ...], rank: int) -> bool:
    """Whether a parameter's gradient goes as factors of that rank: vectors, and matrices too small to gain, go whole."""
    return len(shape) == 2 and rank * sum(shape) < prod(shape)


GRADIENTS: dict[str, GradientCosts] = {
    "none": _dense_sum,
    "powersgd": _powersgd_sum,
    "sign": _sign_sum,
    "sparse": _sparse_sum,
}
