"""calibrated: signed_ema whose share of the step is set by what the codec leaves of a gradient, on coordinates that stand for all.

    G = (1-w)·G_comp + w·|G_comp|·sign(M̄)

At each fire, M_s being the gradient at the weights after s ticks, with means over fires:

    f    mean of sign(M_s)·sign(G_s)    G_s: the compressed gradient of the same samples; over √o where M_s is of a share o of those
    a    mean of sign(M_s)·sign(M_o)    over all pairs of fires of which o had been merged when s was trained
    v    1 / √(1/V + (1 - 1/V)·ρ)       V = (1+β)/(1-β): M whose noise M̄ averages; ρ = sin(πa/2)
    r  = v/(f τ) · min(1, 2a/prior)     τ: how long a sign is felt, `merger.holds`
    w  = min(0.75, cap/τ, r/(1+r))      0 where a ≤ 0, and where f is not beyond chance

Of what a whole gradient tells of other samples' a compressed one tells f times as much, and M̄ tells v times as much, a τth of
which is new in a tick: r weighs the one against the other. f, where both have the noise of the same samples, is known from the
first fires; an M that does not even agree with the compressed gradient of its own samples is of other weights, or of none of
them. How much a whole one tells cancels: one pair tells a to 0.075, and a is half of that. So a, which starts from `prior` as if
seen in some pairs, only says where M̄ tells less than an M should, as one of another policy does: a share fades as a falls below
half of `prior`.
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

PRIOR_PAIRS = 20  # one pair tells a to 0.075, and runs differ in it by 0.017
KEPT = 0.9  # of older M's signs at each fire: what was true of another policy fades
BEYOND = 3  # standard deviations of what fair coins would agree by
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

    signs: Tensor  # of G_s, int8
    overlap: float  # the share of G_s's samples that M has
    others: Tensor | None  # sum of the signs of all M merged by then, older ones less; None before the first
    weight: float  # how many those count as


@dataclass
class Agreements:
    """Over all fires."""

    compressed: Mean = field(default_factory=Mean)  # f; its weight counts coordinates
    anchor: Mean = field(default_factory=Mean)  # a, without its prior; its weight counts pairs


class Calibrated(AlongSigns):
    """Needs sign(M̄), and of each M the signs at the coordinates that it looks at."""

    looks: ClassVar[bool] = True

    def __init__(self, config: MergerSettings):
        super().__init__(config)
        self.seen = Agreements()
        self.window: Tensor | None = None  # sum of G_comp since the last fire, where M has samples of all those ticks
        self.ticks = 0  # in it
        self.others: Tensor | None = None  # as in `Started`, of all M until now
        self.weight = 0.0
        self.sources: dict[int, Started] = {}

    @classmethod
    def cost(cls, config: MergerSettings, n: int) -> MergerCost:
        return MergerCost(learns=4)

    def watch(self, g_comp: Tensor, source: int | None) -> None:
        ticks = 1
        if self.windows:
            self.window = g_comp.clone() if self.window is None else self.window.add_(g_comp)
            self.ticks += 1
            g_comp, ticks = self.window, self.ticks
        if source is not None:
            signs = g_comp.sign().char()
            self.sources[source] = Started(signs, self.replayed / ticks, self.others, self.weight)
            self.window, self.ticks = None, 0

    def learn(self, source: int, m: Tensor, total: Total) -> None:
        then = self.sources.get(source)
        self.sources = {s: kept for s, kept in self.sources.items() if s > source}
        if then is not None:  # else the run was resumed since, on the wall clock
            own, others = sign_products(m, then.signs), (0.0, 0.0)
            if then.others is not None:
                others = float((m * then.others).double().sum().item()), float(m.count_nonzero().item())
            own_sum, own_n, others_sum, n = total([*own, *others])
            if own_n:
                self.seen.compressed.add(own_sum / own_n / math.sqrt(then.overlap), own_n * then.overlap)
            if n:
                self.seen.anchor.add(others_sum / (n * then.weight), then.weight)
        self.others = m.float() if self.others is None else m + KEPT * self.others
        self.weight = 1 + KEPT * self.weight

    @property
    def a(self) -> float:
        mean = self.seen.anchor
        return (PRIOR_PAIRS * self.config.prior + mean.sum) / (PRIOR_PAIRS + mean.weight)

    @property
    def told(self) -> float:
        """v"""
        part = 1 / self.holds.averaged
        return 1 / math.sqrt(part + (1 - part) * math.sin(math.pi / 2 * max(self.a, 0.0)))

    def share(self, age: int) -> float:
        """w, of a correction that has been merged for `age` ticks."""
        f = self.seen.compressed
        if not f.n or f.value <= BEYOND / math.sqrt(f.weight) or self.a <= 0:
            return 0.0
        fades = min(1.0, 2 * self.a / self.config.prior) if self.config.prior > 0 else 1.0
        r = self.told * fades / (f.value * self.holds.tau(age))
        return min(LARGEST, self.holds.bound(self.config.cap, age), r / (1 + r))

    def wants(self) -> bool:
        """A share is 0 at every age or at none."""
        return self.share(0) > 0

    def prepare(self, g_comp: Gradient, correction: Held, age: int, norm: Norm = local_norm) -> None:
        self.dose = self.share(age)

    def factors(self) -> tuple[float, float] | None:
        return (self.dose, 1.0) if self.dose else None

    def metrics(self) -> dict[str, float]:
        f, a = self.seen.compressed, self.seen.anchor
        found = {"merger/w": self.dose, "merger/hold": self.holds.mean(), "merger/tau": self.holds.tau()}
        found |= {"merger/f": f.value, "merger/f_error": f.error} if f.n else {}
        return found | {"merger/a": self.a, "merger/a_error": a.error}

    def state(self) -> dict[str, Tensor]:
        found = {name: t for name, t in (("others", self.others), ("window", self.window)) if t is not None}
        for s, then in self.sources.items():
            found[f"{s}.signs"] = then.signs
            found |= {} if then.others is None else {f"{s}.others": then.others}
        if not found:
            return {}
        double = next(iter(found.values())).new_empty(0).double()
        means = [value for mean in (self.seen.compressed, self.seen.anchor) for value in astuple(mean)]
        found["seen"] = double.new_tensor([*means, self.weight, self.ticks])
        return found | {
            f"{s}.numbers": double.new_tensor([then.overlap, then.weight]) for s, then in self.sources.items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        if "average" in state:
            raise ValueError("this checkpoint's merger.kind 'calibrated' followed an earlier rule: start a new run")
        if "seen" not in state:
            return
        numbers = state["seen"].tolist()
        own, others = (Mean(int(n), *sums) for n, *sums in (numbers[:4], numbers[4:8]))
        self.seen, self.weight, self.ticks = Agreements(own, others), numbers[8], int(numbers[9])
        self.others, self.window = state.get("others"), state.get("window")
        for s in {name.partition(".")[0] for name in state if name[0].isdigit()}:
            overlap, weight = state[f"{s}.numbers"].tolist()
            self.sources[int(s)] = Started(state[f"{s}.signs"], overlap, state.get(f"{s}.others"), weight)


def sign_products(m: Tensor, other: Tensor) -> tuple[float, float]:
    """Of int8 signs [n]: the sum of their products, and how many of them are not 0."""
    product = m * other
    return float(product.long().sum().item()), float(product.count_nonzero().item())
