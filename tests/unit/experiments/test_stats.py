"""Statistics on curves and tables whose answers are known, the published table among them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.stats import above_floor, estimate, factorial, ignition, leader, near_base, paired

VALUES = st.floats(-1, 1).map(lambda v: round(v, 3))


def by_seed(*values: float) -> dict[str, float]:
    return {str(seed): value for seed, value in enumerate(values)}


# --- intervals ---------------------------------------------------------------------------------


def test_an_interval_by_hand():
    """Values 1, 2, 3: s = 1, t(0.975, 2) = 4.3027."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3) and found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert not found.distinguishable
    assert estimate([1.0, 1.1, 1.2]).distinguishable and estimate([-1.0, -1.1, -1.2]).distinguishable


def test_no_interval_from_one_seed_and_nothing_from_none():
    one, none = estimate([5.0]), estimate([])
    assert one.mean == 5.0 and math.isnan(one.half) and not one.distinguishable
    assert math.isnan(none.mean) and none.n == 0 and not none.distinguishable


def test_two_seeds_that_agree_by_chance_are_no_evidence():
    """Seen in a sweep of ten steps: two differences of 1/512 each, an interval of no width."""
    assert not estimate([1 / 512, 1 / 512]).distinguishable
    assert not near_base(by_seed(0.5, 0.6), by_seed(0.2, 0.3), 0.05).certain


def test_the_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for n in (3, 5):
        held = [abs(e.mean) <= e.half for e in (estimate(rng.normal(size=n)) for _ in range(4000))]
        assert np.mean(held) == pytest.approx(0.95, abs=0.011)


def test_pairing_removes_what_a_seed_does_to_both_cells():
    luck = [0.0, 0.3, -0.2, 0.5]
    a, b = by_seed(*(0.7 + x for x in luck)), by_seed(*(0.6 + x for x in luck))
    assert paired(a, b).mean == pytest.approx(0.1) and paired(a, b).half < 1e-9 < estimate(list(a.values())).half
    assert paired(a, {"0": 0.6, "9": 5.0}).n == 1  # only common seeds


# --- the 2x2 -----------------------------------------------------------------------------------


@given(VALUES, VALUES, VALUES, VALUES, st.lists(VALUES, min_size=2, max_size=5))
def test_effects_that_were_put_in_are_found(base: float, delay: float, cadence: float, both: float, luck: list[float]):
    def cell(*effects: float) -> dict[str, float]:
        return by_seed(*(base + x + sum(effects) for x in luck))

    found = factorial(cell(), cell(delay), cell(cadence), cell(delay, cadence, both))
    assert found.first.mean == pytest.approx(delay + both / 2, abs=1e-9)
    assert found.second.mean == pytest.approx(cadence + both / 2, abs=1e-9)
    assert found.interaction.mean == pytest.approx(both, abs=1e-9)
    assert found.interaction.half < 1e-9 and found.first.n == len(luck)


def test_the_prototypes_table():
    """{5,5} 0.75, {20,5} 0.47, {5,20} 0.29, {20,20} 0.19: the hold hurts more, and the two do not add up."""
    found = factorial(*(by_seed(v, v) for v in (0.75, 0.47, 0.29, 0.19)))
    assert found.first.mean == pytest.approx(-0.19) and found.second.mean == pytest.approx(-0.37)
    assert found.interaction.mean == pytest.approx(0.18)


def test_a_seed_that_is_missing_in_one_cell_counts_in_none():
    full, holed = by_seed(0.5, 0.6, 0.7), {"0": 0.1, "2": 0.1}
    assert factorial(full, full, holed, full).interaction.n == 2


# --- gates -------------------------------------------------------------------------------------


def test_the_published_table():
    """K=20 fails the 0.05 gate by 0.088 (val@50, against K=5) and ends below the floor."""
    k5, k20, floor = by_seed(0.7362), by_seed(0.6482), by_seed(0.6300)
    gate = near_base(k5, k20, 0.05)
    assert not gate.passed and gate.found.mean == pytest.approx(0.088) and not gate.certain  # of one seed
    assert above_floor(k20, floor).passed  # at step 50 it is still above
    end = above_floor(by_seed(0.4435), floor)
    assert not end.passed and end.found.mean == pytest.approx(0.1865)
    assert near_base(by_seed(0.7657), k5, 0.05).passed  # K=5 against dense


def test_a_gate_is_certain_when_its_interval_is_on_one_side():
    base = by_seed(0.80, 0.81, 0.79)
    assert near_base(base, by_seed(0.79, 0.80, 0.78), 0.05).certain
    assert near_base(base, by_seed(0.60, 0.61, 0.59), 0.05).certain
    near = near_base(base, by_seed(0.74, 0.79, 0.74), 0.05)
    assert near.passed and not near.certain


# --- ignition ----------------------------------------------------------------------------------


def noisy(values: list[float], seed: int = 0, noise: float = 0.03) -> dict[float, float]:
    rng = np.random.default_rng(seed)
    return {step: value * (1 + noise * rng.normal()) for step, value in enumerate(values, start=1)}


def flat_then(rise: list[float], at: int, steps: int = 100, level: float = 12.0) -> list[float]:
    curve = [level] * (at - 1) + [level * factor for factor in rise]
    return (curve + [curve[-1]] * steps)[:steps]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("level", [0.2, 12.0, 400.0])
def test_a_jump_is_found_where_it_is(seed: int, level: float):
    found = ignition(noisy(flat_then([2.0], at=60, level=level), seed))
    assert found is not None and abs(found - 60) <= 2


@pytest.mark.parametrize("seed", range(20))
def test_a_slow_spiral_is_found_when_it_has_risen_by_a_quarter(seed: int):
    spiral = flat_then([1 + 0.05 * i for i in range(60)], at=40)  # reaches 1.25 at step 45
    assert abs(ignition(noisy(spiral, seed)) - 46) <= 3


@pytest.mark.parametrize("seed", range(50))
def test_noise_a_fall_and_an_excursion_that_returns_are_none(seed: int):
    rng = np.random.default_rng(seed)
    assert ignition(noisy([12.0] * 100, seed)) is None
    assert ignition(noisy([12.0 * 0.99**i for i in range(100)], seed)) is None
    assert ignition(noisy(flat_then([3.0] * 15 + [1.0], at=50), seed)) is None
    spikes = noisy([12.0] * 100, seed)
    spikes |= {int(step): 60.0 for step in rng.choice(np.arange(1, 101), 8, replace=False) if step % 3 == 0}
    assert ignition(spikes) is None


def test_one_step_back_inside_does_not_move_an_ignition():
    curve = noisy(flat_then([2.0], at=60))
    assert ignition(curve | {80: 12.0}) == ignition(curve)


def test_a_run_too_short_or_with_gaps():
    assert ignition({}) is None and ignition({s: 1.0 for s in range(9)}) is None
    holes = noisy(flat_then([2.0], at=60)) | {s: math.nan for s in range(1, 100, 7)}
    assert abs(ignition(holes) - 60) <= 3


def test_who_led():
    assert leader(40, 47) == "length" and leader(None, 47) == "entropy" and leader(40, None) == "length"
    assert leader(40, 42) == "together" and leader(None, None) is None
