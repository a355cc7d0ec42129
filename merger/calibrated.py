"""calibrated: signed_ema whose share of the step is set by how well signs agree, on coordinates that stand for all.

    G = (1-w)·G_comp + w·|G_comp|·sign(M̄)

At each fire, M_s being the gradient at the weights after s ticks, with means over fires:

    a_G    mean of sign(M_s)·sign(m_G)    m_G: average of G_comp before s, so of no batch that M_s has
    a      mean of sign(M_s)·sign(M_o)    over all pairs of fires of which o had been merged when s was trained
    a_M    a / √(1/V + (1 - 1/V)·ρ)       as of M̄, whose β averages the noise of V = (1+β)/(1-β) of them; ρ = sin(πa/2)
    h      ‖m_G‖ / ‖G_comp‖
    r    = N h a_M / (a_G τ)              N: ticks that m_G averages; τ: how long a sign is felt, `merger.holds`
    w    = min(0.75, cap/τ, r/(1+r))      0 while nothing has been seen, or where a_M ≤ 0

a_M is what a correction is worth by the time that it is used, a_G·N/h what as many compressed gradients are: r weighs the one, a
τth of which is new in a tick, against the other. a starts from `prior` as if seen in a few pairs. Of a_G what lies beyond its
standard error counts, and half of that error, so that beside a codec whose gradient cannot be told from noise the anchor gets the
share that the hold allows.
ρ: numbers that are jointly normal agree in sign by 2/π·asin of their correlation.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, ClassVar

from merger.along_signs import AlongSigns
from merger.interface import MergerCost, Norm, Total, local_norm
from merger.settings import MergerSettings

if TYPE_CHECKING:
    from torch import Tensor

    from merger.interface import Gradient, Held

MEMORY = 0.9  # of m_G
AVERAGED = (1 + MEMORY) / (1 - MEMORY)  # ticks of noise that it averages away
PRIOR_PAIRS = 3  # one pair tells a to 0.075
KEPT = 0.9  # of older M's signs at each fire: what was true of another policy fades
SPREAD = 0.03  # of a_G from one fire to the next
LARGEST = 0.75  # signed_ema's own share at a full dose


def pairs(earlier: int) -> float:
    """As how many the signs of so many earlier M count."""
    return (1 - KEPT**earlier) / (1 - KEPT)


@dataclass
class Mean:
    """Of one number a fire, each with a weight."""

    n: int = 0
    weight: float = 0.0
    sum: float = 0.0
    squares: float = 0.0

    def add(self, x: float, weight: float = 1.0) -> None:
        self.n, self.weight = self.n + 1, self.weight + weight
        self.sum, self.squares = self.sum + weight * x, self.squares + weight * x * x

    @property
    def value(self) -> float:
        return self.sum / self.weight if self.weight else 0.0

    @property
    def error(self) -> float:
        """Standard error; 0 before the second."""
        if self.n < 2:
            return 0.0
        return math.sqrt(max(0.0, self.squares / self.weight - self.value**2) / (self.n - 1))


@dataclass
class Started:
    """What a rank had when a fire started, at the coordinates looked at."""

    signs: Tensor | None  # of m_G, int8; None before the second tick
    others: Tensor | None  # sum of the signs of all M merged by then, older ones less; None before the first
    weight: float  # how many those count as
    squares: tuple[float, float]  # of m_G and of that tick's G_comp, of this stage


@dataclass
class Agreements:
    """Over all fires."""

    compressed: Mean = field(default_factory=Mean)  # a_G
    anchor: Mean = field(default_factory=Mean)  # a, without its prior; its weight counts pairs
    average: float = 0.0  # sum of ‖m_G‖²
    single: float = 0.0  # sum of ‖G_comp‖²
    averaged: float = AVERAGED  # N

    @property
    def h(self) -> float:
        return math.sqrt(self.average / self.single) if self.single else 0.0


class Calibrated(AlongSigns):
    """Needs sign(M̄), and of each M the signs at the coordinates that it looks at."""

    looks: ClassVar[bool] = True

    def __init__(self, config: MergerSettings):
        super().__init__(config)
        self.seen = Agreements()
        self.average: Tensor | None = None  # m_G
        self.others: Tensor | None = None  # as in `Started`, of all M until now
        self.weight = 0.0
        self.sources: dict[int, Started] = {}
        self.before: tuple[Tensor | None, tuple[float, float]] = (None, (0.0, 0.0))  # what the last fire started with

    @classmethod
    def cost(cls, config: MergerSettings, n: int) -> MergerCost:
        return MergerCost(learns=6)

    def watch(self, g_comp: Tensor, source: int | None) -> None:
        if source is not None:
            signs, squares = None, (0.0, 0.0)
            if self.average is not None:
                signs, squares = self.average.sign().char(), (_square(self.average), _square(g_comp))
            if self.windows:  # M has samples of every tick since the last fire
                (signs, squares), self.before = self.before, (signs, squares)
            self.sources[source] = Started(signs, self.others, self.weight, squares)
        self.average = g_comp.clone() if self.average is None else self.average.lerp_(g_comp, 1 - MEMORY)

    def learn(self, source: int, m: Tensor, total: Total) -> None:
        then = self.sources.get(source)
        self.sources = {s: kept for s, kept in self.sources.items() if s > source}
        if then is not None:  # else the run was resumed since, on the wall clock
            own, others = sign_products(m, then.signs), (0.0, 0.0)
            if then.others is not None:
                others = float((m * then.others).double().sum().item()), float(m.count_nonzero().item())
            own_sum, own_n, others_sum, n, average, single = total([*own, *others, *then.squares])
            if own_n:
                self.seen.compressed.add(own_sum / own_n)
                self.seen.average += average
                self.seen.single += single
            if n:
                self.seen.anchor.add(others_sum / (n * then.weight), then.weight)
        self.others = m.float() if self.others is None else m + KEPT * self.others
        self.weight = 1 + KEPT * self.weight

    @property
    def a_g(self) -> float:
        mean = self.seen.compressed
        error = SPREAD / math.sqrt(mean.n)
        return max(0.0, mean.value - error) + 0.5 * error

    @property
    def a_m(self) -> float:
        mean = self.seen.anchor
        return self._averaged((PRIOR_PAIRS * self.config.prior + mean.sum) / (PRIOR_PAIRS + mean.weight))

    def _averaged(self, a: float) -> float:
        """What of two M is `a`, of M and M̄."""
        part = 1 / self.holds.averaged
        return a / math.sqrt(part + (1 - part) * math.sin(math.pi / 2 * max(a, 0.0)))

    def share(self, age: int) -> float:
        """w, of a correction that has been merged for `age` ticks."""
        if not self.seen.compressed.n or self.a_m <= 0 or not self.seen.single:
            return 0.0
        r = self.seen.averaged * self.seen.h * self.a_m / (self.a_g * self.holds.tau(age))
        return min(LARGEST, self.holds.bound(self.config.cap, age), r / (1 + r))

    def wants(self) -> bool:
        """A share is 0 at every age or at none."""
        return self.share(0) > 0

    def prepare(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> None:
        self.dose = self.share(age)

    def factors(self) -> tuple[float, float] | None:
        return (self.dose, 1.0) if self.dose else None

    def metrics(self) -> dict[str, float]:
        found = {"merger/w": self.dose, "merger/hold": self.holds.mean(), "merger/tau": self.holds.tau()}
        if self.seen.compressed.n:
            found |= {"merger/a_g": self.a_g, "merger/a_g_error": self.seen.compressed.error}
        return found | {"merger/a_m": self.a_m, "merger/a_m_error": self._averaged(self.seen.anchor.error)}

    def state(self) -> dict[str, Tensor]:
        if self.average is None:
            return {}
        seen, double = self.seen, self.average.double()
        means = [value for mean in (seen.compressed, seen.anchor) for value in astuple(mean)]
        found = {"average": self.average, "seen": double.new_tensor([*means, seen.average, seen.single, self.weight])}
        found |= {} if self.others is None else {"others": self.others}
        signs, squares = self.before
        found |= {"before.squares": double.new_tensor(squares)} | ({} if signs is None else {"before.signs": signs})
        for s, then in self.sources.items():
            kept = {"signs": then.signs, "others": then.others}
            kept["numbers"] = double.new_tensor([then.weight, *then.squares])
            found |= {f"{s}.{name}": tensor for name, tensor in kept.items() if tensor is not None}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        if "average" not in state:
            return
        self.average = state["average"]
        numbers = state["seen"].tolist()
        own, others = (Mean(int(n), *sums) for n, *sums in (numbers[:4], numbers[4:8]))
        self.seen, self.weight = Agreements(own, others, *numbers[8:10]), numbers[10]
        self.others = state.get("others")
        average, single = state["before.squares"].tolist()
        self.before = state.get("before.signs"), (average, single)
        for s in {name.partition(".")[0] for name in state if name[0].isdigit()}:
            weight, average, single = state[f"{s}.numbers"].tolist()
            squares = average, single
            self.sources[int(s)] = Started(state.get(f"{s}.signs"), state.get(f"{s}.others"), weight, squares)


def _square(x: Tensor) -> float:
    return x.double().square().sum().item()


def sign_products(m: Tensor, other: Tensor | None) -> tuple[float, float]:
    """Of int8 signs [n]: the sum of their products, and how many of them are not 0."""
    if other is None:
        return 0.0, 0.0
    product = m * other
    return float(product.long().sum().item()), float(product.count_nonzero().item())
