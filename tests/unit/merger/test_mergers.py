"""Mergers against slow loops over coordinates in Python floats, and the facts the contract states about them."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from codec import signs
from merger import MERGERS, make_merger, merger_class
from merger.config import MergerConfig
from merger.interface import Merger, local_norm
from merger.placebo import PLACEBOS


def normal(n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def pair(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """G_comp and M̄ of different sizes, with zeros of either in some places."""
    g, m = normal(n, 1), normal(n, 2, 30.0)
    g[::11] = 0
    m[::7] = 0
    return g, m


def merger(kind: str = "signed_ema", **config):
    return MERGERS[kind](MergerConfig(kind=kind, **config))


def sign(x: float) -> float:
    return math.copysign(1.0, x) if x else 0.0


def slow_direction(kind: str, g: list[float], m: list[float], alpha: float) -> list[float]:
    """What is added to G_comp at dose 1: S - G_comp, or δ."""
    if kind == "delta":
        return m
    return [alpha * a + (1 - alpha) * abs(a) * sign(b) - a for a, b in zip(g, m)]


def slow_merge(kind: str, g: list[float], m: list[float], dose: float, alpha: float = 0.25) -> list[float]:
    return [a + dose * step for a, step in zip(g, slow_direction(kind, g, m, alpha))]


def norm(x: list[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in x))


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


# --- formulae ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["signed_ema", "delta"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dose", [0.0, 0.5, 1.0, 1.7])
def test_every_coordinate_follows_the_formula(kind: str, alpha: float, dose: float):
    g, m = pair()
    close(merger(kind, alpha=alpha, dose=dose)(g, m, age=0), slow_merge(kind, g.tolist(), m.tolist(), dose, alpha))


@pytest.mark.parametrize("kind", MERGERS)
def test_neither_the_gradient_nor_the_correction_is_written_to(kind: str):
    g, m = pair()
    kept_g, kept_m = g.clone(), m.clone()
    merger(kind)(g, m, age=3)
    assert torch.equal(g, kept_g) and torch.equal(m, kept_m)


def test_no_merger_leaves_the_gradient_whatever_the_correction():
    g, m = pair()
    none = merger("none", dose=5.0)
    assert torch.equal(none(g, m, age=0), g) and torch.equal(none(g, m * math.nan, age=9), g)
    assert none.payload is None


@pytest.mark.parametrize("kind", ["signed_ema", "delta"])
def test_at_dose_zero_the_gradient_is_unchanged(kind: str):
    g, m = pair()
    assert torch.equal(merger(kind, dose=0.0)(g, m, age=0), g)


def test_delta_at_dose_one_puts_back_what_the_codec_lost_when_nothing_has_aged():
    """With δ = M̄ - G_comp of this very tick, G is M̄."""
    g, m = pair()
    torch.testing.assert_close(merger("delta")(g, m - g, age=0), m, rtol=1e-5, atol=1e-5)


# --- multipliers of signed_ema -----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dose", [0.3, 2 / 3, 1.0])
def test_a_coordinate_is_kept_where_signs_agree_and_multiplied_by_the_stated_facts_elsewhere(alpha: float, dose: float):
    g, m = pair()
    merged = merger(alpha=alpha, dose=dose)(g, m, age=0)
    agree, differ, silent = g * m > 0, g * m < 0, m == 0
    assert agree.sum() > 50 and differ.sum() > 50 and (silent & (g != 0)).sum() > 20
    assert torch.equal(merged[agree], g[agree])
    torch.testing.assert_close(merged[differ], (1 - 2 * dose * (1 - alpha)) * g[differ], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged[silent], (1 - dose * (1 - alpha)) * g[silent], rtol=1e-5, atol=1e-6)
    assert not merged[g == 0].any()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
def test_a_dose_up_to_the_no_flip_bound_never_reverses_a_coordinate_and_one_above_it_does(alpha: float):
    g, m = pair()
    bound = 1 / (2 * (1 - alpha))
    inside = merger(alpha=alpha, dose=bound * 0.999)(g, m, age=0)
    above = merger(alpha=alpha, dose=bound * 1.01)(g, m, age=0)
    assert (inside * g >= 0).all()
    assert ((above * g < 0) == (g * m < 0)).all()


def test_the_full_dose_of_the_default_reverses_half_of_a_coordinate_of_wrong_sign():
    assert merger()(torch.tensor([4.0]), torch.tensor([-1.0]), age=0).tolist() == [-2.0]


@pytest.mark.parametrize("config", [{}, {"dose": 0.6}, {"adaptive_lambda_mode": "ratio", "lambda_cap": 0.4}])
def test_the_sign_alone_gives_the_same_bits_as_the_dense_correction(config: dict):
    g, m = pair()
    g[5], m[6] = -0.0, -0.0
    packed = signs.decode(signs.encode(m), m.numel())
    assert packed.dtype == torch.int8
    from_sign, from_dense = merger(**config)(g, packed, age=2), merger(**config)(g, m, age=2)
    assert torch.equal(from_sign.view(torch.int32), from_dense.view(torch.int32))


# --- dose --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["signed_ema", "delta"])
@pytest.mark.parametrize("age", [0, 1, 2, 7])
def test_the_dose_decays_with_every_tick_of_age(kind: str, age: int):
    g, m = pair()
    tool = merger(kind, dose=0.8, age_decay=0.9)
    expected = 0.8
    for _ in range(age):
        expected *= 0.9
    close(tool(g, m, age=age), slow_merge(kind, g.tolist(), m.tolist(), expected))
    assert tool.dose == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["signed_ema", "delta"])
@pytest.mark.parametrize("cap", [0.05, 1.0, 50.0])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_ratio_gate_is_the_cap_or_the_inverse_of_the_correction_ratio(kind: str, cap: float, size: float):
    g, m = pair()
    m = m / 30 * size
    tool = merger(kind, dose=0.7, age_decay=0.5, adaptive_lambda_mode="ratio", lambda_cap=cap)
    c = norm(slow_direction(kind, g.tolist(), m.tolist(), 0.25)) / norm(g.tolist())
    expected = 0.7 * 0.5**2 * min(cap, 1 / c)
    close(tool(g, m, age=2), slow_merge(kind, g.tolist(), m.tolist(), expected))
    assert tool.dose == pytest.approx(expected, rel=1e-5)


def test_under_the_ratio_gate_the_applied_correction_is_never_longer_than_the_gradient():
    for seed in range(5):
        g, delta = normal(100, seed), normal(100, seed + 50, 10.0**seed)
        merged = merger("delta", adaptive_lambda_mode="ratio", lambda_cap=1e9)(g, delta, age=0)
        assert (merged - g).norm() == pytest.approx(g.norm().item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["signed_ema", "delta"])
def test_the_ratio_gate_is_the_cap_where_there_is_nothing_to_correct(kind: str):
    g = normal(20, 1)
    nothing = g.sign() if kind == "signed_ema" else torch.zeros(20)  # signs that all agree, or no δ
    tool = merger(kind, adaptive_lambda_mode="ratio", lambda_cap=0.5)
    assert torch.equal(tool(g, nothing, age=0), g) and tool.dose == 0.5


def test_the_ratio_gate_gives_nothing_to_a_gradient_of_zero():
    assert not merger("delta", adaptive_lambda_mode="ratio")(torch.zeros(5), torch.ones(5), age=0).any()


@pytest.mark.parametrize("kind", ["signed_ema", "delta"])
def test_stages_that_sum_their_norms_apply_the_dose_of_the_whole_model(kind: str):
    g, m = pair()
    config = dict(adaptive_lambda_mode="ratio", lambda_cap=1e9)
    whole = merger(kind, **config)(g, m, age=0)
    cuts = [slice(0, 90), slice(90, 400)]
    lengths: dict[int, list[float]] = {}

    def first_pass(stage: int):
        def record(x: torch.Tensor) -> float:
            lengths.setdefault(stage, []).append(x.double().square().sum().item())
            return 1.0

        return record

    for stage, cut in enumerate(cuts):
        merger(kind, **config)(g[cut], m[cut], 0, first_pass(stage))
    totals = [math.sqrt(a + b) for a, b in zip(lengths[0], lengths[1])]
    parts = []
    for cut in cuts:
        sums = iter(totals)
        parts.append(merger(kind, **config)(g[cut], m[cut], 0, lambda x, sums=sums: next(sums)))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_a_merger_says_what_the_anchor_must_publish_for_it():
    expected = {"none": None, "signed_ema": "sign", "calibrated": "sign", "delta": "dense", "replace": "dense"}
    assert {kind: MERGERS[kind].payload for kind in MERGERS} == expected
    assert [kind for kind in MERGERS if MERGERS[kind].looks] == ["calibrated"]
    assert [kind for kind in MERGERS if MERGERS[kind].needs_source] == ["delta"]


def test_the_config_allows_the_kinds_of_the_registry_and_anybodys_own():
    assert {MergerConfig(kind=kind).kind for kind in MERGERS} == set(MERGERS)
    assert MergerConfig(kind="my_mergers.late:Half").kind == "my_mergers.late:Half"


@pytest.mark.parametrize("kind", ["singed_ema", "", "mine", "mine:", ":Half", "my module:Half", "mine:Half()"])
def test_another_kind_is_refused_with_those_that_there_are(kind: str):
    with pytest.raises(
        ValueError,
        match=r"must be one of 'none', 'signed_ema', 'calibrated', 'delta', 'replace', or 'package.module:name'",
    ):
        MergerConfig(kind=kind)


# --- somebody else's ---------------------------------------------------------------------------


class Half(Merger):
    """Half of signed_ema with α = 0, at any age; counts its merges."""

    payload = "sign"

    def __init__(self, config: MergerConfig):
        super().__init__(config)
        self.merges = 0

    def prepare(self, g_comp, correction, age, norm=local_norm) -> None:
        self.dose = 0.5 * self.config.dose
        self.merges += 1

    def apply(self, g_comp, correction):
        return g_comp + self.dose * (abs(g_comp) * correction.sign() - g_comp)

    def state(self):
        return {"merges": torch.tensor(self.merges)}

    def restore(self, state) -> None:
        self.merges = int(state["merges"])


HERE = "tests.unit.merger.test_mergers"


def test_a_merger_of_somebody_elses_is_made_by_its_name():
    g, m = pair()
    tool = make_merger(MergerConfig(kind=f"{HERE}:Half", dose=0.8))
    assert merger_class(f"{HERE}:Half") is Half and isinstance(tool, Half)
    assert torch.equal(tool(g, m, age=7), merger(alpha=0.0, dose=0.4)(g, m, age=0))


class Unfinished(Merger):
    payload = "sign"

    def prepare(self, g_comp, correction, age, norm=local_norm) -> None: ...


class Confused(Half):
    needs_source = True


class Whole(Half):
    payload = "all of it"


class Doseless(Half):
    def __init__(self, config: MergerConfig): ...


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no.such.module:Half", "cannot be imported here: ModuleNotFoundError: No module named 'no'"),
        (f"{HERE}:Hlaf", "cannot be imported here: AttributeError: .*Hlaf"),
        (f"{HERE}:Unfinished", "is no merger: it lacks apply; derive it from merger.interface.Merger"),
        (
            f"{HERE}:pair",
            "is no merger: it lacks apply, capped, cost, has_effect, learn, looks, metrics, needs_source, payload, prepare, "
            "replayed, restore, state, wants, watch",
        ),
        (f"{HERE}:Confused", "needs_source True: .* needs 'dense'"),
        (f"{HERE}:Whole", "payload 'all of it' .*: payload is 'sign', 'dense' or None"),
        (f"{HERE}:Doseless", "is no merger: it lacks dose"),
    ],
)
def test_what_is_no_merger_is_refused_with_what_it_lacks(kind: str, says: str):
    with pytest.raises(ValueError, match=says):
        make_merger(MergerConfig(kind=kind))


@pytest.mark.parametrize("kind", [*MERGERS, f"{HERE}:Half"])
def test_a_merger_goes_on_from_its_state(kind: str):
    g, m = pair()
    first, again = (make_merger(MergerConfig(kind=kind)) for _ in range(2))
    first(g, m, age=0)
    again.restore({k: v.clone() for k, v in first.state().items()})
    assert torch.equal(first(g, m, age=1), again(g, m, age=1)) and first.state() == again.state()


# --- tensors and arrays ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"dose": 0.6, "alpha": 0.3}, {"adaptive_lambda_mode": "ratio", "lambda_cap": 0.4}]
)
@pytest.mark.parametrize(
    ("kind", "signs_alone"), [("none", False), ("delta", False), ("signed_ema", False), ("signed_ema", True)]
)
def test_numpy_arrays_are_merged_to_the_bits_of_tensors(kind: str, config: dict, signs_alone: bool):
    g, m = pair()
    m = m.sign().char() if signs_alone else m
    norm = 3.7 if kind == "none" else local_norm(g)
    on_tensors = merger(kind, **config)(g, m, 2, lambda x: norm)
    on_arrays = merger(kind, **config)(g.numpy(), m.numpy(), 2, lambda x: norm)
    assert isinstance(on_arrays, np.ndarray) and on_arrays.dtype == np.float32
    assert torch.equal(on_tensors.view(torch.int32), torch.from_numpy(on_arrays).view(torch.int32))


# --- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MERGERS)
@pytest.mark.parametrize("mode", ["none", "ratio"])
def test_a_merger_takes_as_many_norms_as_it_says_and_keeps_as_much(kind: str, mode: str):
    g, m = pair()
    tool, taken = merger(kind, adaptive_lambda_mode=mode), []
    tool.prepare(g, m, 0, lambda x: taken.append(x) or 1.0)
    cost = tool.cost(tool.config, len(g))
    assert len(taken) == cost.norms and sum(t.nbytes for t in tool.state().values()) == cost.state


# --- placebos ----------------------------------------------------------------------------------


def placebo(kind: str, beta: float = 0.5, seed: int = 3, **sizes: int):
    return PLACEBOS[kind](beta, seed, sizes or {"a": 400})


def test_the_own_placebo_is_the_sign_of_the_average_of_the_gradients_it_kept():
    gradients = [normal(400, seed) for seed in range(4)]
    gradients[0][::9] = 0
    tool, average = placebo("own", beta=0.7), None
    for source, g in enumerate(gradients):
        tool.keep(source, g)
        average = g.double() if average is None else 0.7 * average + 0.3 * g.double()
        found, alone = tool.fire(source, normal(400, 99))
        assert torch.equal(alone, g.sign().char())
        assert found.dtype == torch.int8 and torch.equal(found.double(), average.sign())


def test_the_own_placebo_keeps_a_gradient_as_it_was_until_its_fire():
    g, tool = normal(50, 1), placebo("own", a=50)
    kept = g.clone()
    tool.keep(4, g)
    g.zero_()
    tool.keep(6, normal(50, 2))
    assert torch.equal(tool.fire(4, g)[0], kept.sign().char()) and list(tool.sources) == [6]


def test_the_own_placebo_without_delay_and_memory_leaves_the_gradient_as_it_is():
    g, tool = normal(400, 1), placebo("own", beta=0.0)
    tool.keep(0, g)
    assert torch.equal(merger()(g, tool.fire(0, g)[0], age=0), g)


def test_random_signs_are_fair_and_differ_by_fire_seed_and_parameter():
    n = 20_000
    draws = [
        placebo("random", seed=seed, **{name: n}).fire(source, normal(2, 0))[0]
        for seed, name, source in [(3, "a", 5), (4, "a", 5), (3, "b", 5), (3, "a", 10)]
    ]
    for i, x in enumerate(draws):
        assert x.dtype == torch.int8 and set(x.tolist()) == {-1, 1} and abs(x.float().mean()) < 5 / math.sqrt(n)
        for y in draws[:i]:
            assert abs((x * y).float().mean()) < 5 / math.sqrt(n)


def test_random_signs_depend_on_the_name_of_a_parameter_and_not_on_who_holds_it():
    whole = placebo("random", a=30, b=50, c=20).fire(5, normal(2, 0))[0]
    head, tail = placebo("random", a=30, b=50), placebo("random", c=20, a=30)  # a is tied: on both stages
    assert torch.equal(torch.cat([head.fire(5, normal(2, 0))[0], tail.fire(5, normal(2, 0))[0][:20]]), whole)
    assert torch.equal(tail.fire(5, normal(2, 0))[0][20:], whole[:30])


@pytest.mark.parametrize("kind", PLACEBOS)
def test_a_placebo_goes_on_from_its_state(kind: str):
    def step(tool, source: int) -> torch.Tensor:
        tool.keep(source + 1, normal(400, source + 1))
        return tool.fire(source, normal(400, 0))[0]

    first, again = placebo(kind), placebo(kind)
    first.keep(0, normal(400, 0))
    for source in range(3):
        step(first, source)
    again.restore({k: v.clone() for k, v in first.state().items()})
    for source in range(3, 6):
        assert torch.equal(step(first, source), step(again, source))


def test_a_placebo_stands_in_for_signs_only():
    assert set(get_args(get_args(MergerConfig.model_fields["placebo"].annotation)[0])) == set(PLACEBOS)
    with pytest.raises(ValueError, match="stands in for the signs"):
        MergerConfig(kind="delta", placebo="own")
