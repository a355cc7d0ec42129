"""The share of a calibrated correction against its formula, written again in plain numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from merger.calibrated import Calibrated
from merger.config import MergerConfig
from merger.delta import Delta
from merger.holds import Holds
from merger.look import looked_at, stride_of
from merger.replace import Replace
from merger.signed_ema import SignedEMA

N, DELAY, CADENCE = 4000, 6, 4
TRUE = torch.randn(N, generator=torch.Generator().manual_seed(0))


def noisy(seed: int, signal: float) -> torch.Tensor:
    return signal * TRUE + torch.randn(N, generator=torch.Generator().manual_seed(seed))


def calibrated(**config: float) -> Calibrated:
    merger = Calibrated(MergerConfig(kind="calibrated", **config))
    merger.holds = Holds(CADENCE, 0.5)
    return merger


def run(merger: Calibrated, ticks: range, signal: float = 0.3, anchor: float | None = None) -> list[float]:
    """The share in each of these ticks. Fires start at 2, 6, 10 …, each merged DELAY ticks later, its signs as M's.

    `signal`: how much of the truth a compressed gradient has, and, unless `anchor` says otherwise, an M.
    """
    anchor = signal if anchor is None else anchor
    shares = []
    for t in ticks:
        merger.watch(noisy(t, signal), t - 1 if (t - 1) % CADENCE == 2 else None)
        source = t - DELAY
        if source >= 2 and (source - 2) % CADENCE == 0:
            merger.holds.fire(t)
            merger.learn(source, noisy(10_000 + source, anchor).sign().char(), list)
        if t >= 2 + DELAY:
            merger.prepare(TRUE, TRUE, age=(t - DELAY - 2) % CADENCE)
            shares.append(merger.dose)
    return shares


def slow_share(ticks: int, signal: float, cap: float = 12.0, prior: float = 0.03) -> float:
    """In the last of `ticks`, by the formula of the docstring."""
    average, averages, sizes = None, {}, {}
    for t in range(1, ticks + 1):
        g = noisy(t, signal).double().numpy()
        if (t - 1) % CADENCE == 2 and average is not None:
            averages[t - 1], sizes[t - 1] = average, (np.sum(average**2), np.sum(g**2))
        average = g if average is None else 0.9 * average + 0.1 * g
    fires = [s for s in averages if s + DELAY <= ticks]
    m = {s: np.sign(noisy(10_000 + s, signal).double().numpy()) for s in range(2, ticks, CADENCE)}
    own = [float(np.mean(m[s] * np.sign(averages[s]))) for s in fires]
    pairs, weights = 3 * prior, 3.0
    for s in fires:
        for k, earlier in enumerate(reversed([o for o in m if o + DELAY <= s])):  # older ones count less
            pairs, weights = pairs + 0.9**k * float(np.mean(m[s] * m[earlier])), weights + 0.9**k
    a_g = max(0.0, float(np.mean(own)) - 0.03 / math.sqrt(len(own))) + 0.5 * 0.03 / math.sqrt(len(own))
    a = pairs / weights
    a_m = a / math.sqrt(1 / 3 + 2 / 3 * math.sin(math.pi * max(a, 0.0) / 2))
    h = math.sqrt(sum(sizes[s][0] for s in fires) / sum(sizes[s][1] for s in fires))
    tau = CADENCE * 1.5 / 0.5
    r = 19 * h * a_m / (a_g * tau)
    return min(0.75, cap / tau, r / (1 + r)) if a_m > 0 else 0.0


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("ticks", [9, 12, 40])
def test_the_share_is_that_of_the_formula(ticks: int, signal: float):
    assert run(calibrated(), range(1, ticks + 1), signal)[-1] == pytest.approx(slow_share(ticks, signal), rel=1e-5)


def test_an_anchor_that_disagrees_with_itself_gets_nothing_and_leaves_the_gradient_as_it_is():
    merger = calibrated(prior=-0.2)
    assert set(run(merger, range(1, 40), signal=0.0)) == {0.0} and not merger.wants()
    g = noisy(5, 0.1)
    g[::7] = -0.0
    assert torch.equal(merger(g, TRUE, age=0).view(torch.int32), g.view(torch.int32))


def test_before_the_first_fire_has_been_compared_nothing_is_merged():
    merger = calibrated()
    merger.watch(noisy(1, 0.3), 0)  # the first tick: no average before it
    merger.holds.fire(6)
    merger.learn(0, noisy(2, 0.3).sign().char(), list)
    assert merger.share(0) == 0.0


def test_a_good_codec_keeps_more_of_itself_than_a_noisy_one_and_a_long_hold_takes_less():
    good, poor = (run(calibrated(), range(1, 60), signal, anchor=0.5)[-1] for signal in (0.5, 0.0))
    assert 0 < good < poor <= 0.75
    merger = calibrated()
    run(merger, range(1, 60), signal=0.5)
    shares = [merger.share(age) for age in (0, CADENCE - 1, 20, 200, 5000)]
    assert shares[0] == shares[1] > shares[2] > shares[3] > shares[4] < 0.01  # an anchor that is gone fades away
    assert shares[4] > 0 and merger.wants()


def test_a_share_is_the_same_from_a_state_and_from_two_stages():
    whole, first, second = calibrated(), calibrated(), calibrated()
    expected = run(whole, range(1, 50))
    run(first, range(1, 24))
    second.holds.restore(first.holds.fields())
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    assert run(second, range(24, 50)) == expected[-26:]

    halves = [calibrated(), calibrated()]
    numbers: list[list[float]] = []
    for t in range(1, 10):
        for k, half in enumerate(halves):
            half.watch(noisy(t, 0.3).chunk(2)[k], t - 1 if t == 3 else None)
    m = noisy(10_002, 0.3).sign().char().chunk(2)
    halves[0].learn(2, m[0], lambda found: numbers.append(found) or found)
    halves[1].learn(2, m[1], lambda found: [a + b for a, b in zip(found, numbers[0])])
    one = calibrated()
    for t in range(1, 10):
        one.watch(noisy(t, 0.3), t - 1 if t == 3 else None)
    one.learn(2, torch.cat(m), list)
    assert halves[1].share(0) == pytest.approx(one.share(0), rel=1e-12)


def test_of_a_window_only_what_lies_before_it_counts():
    """What the fire before started with: m_G has no batch that M has."""
    windows, ticks = calibrated(), calibrated()
    windows.windows = True
    for merger in (windows, ticks):
        run(merger, range(1, 12))
    assert windows.sources[10].signs is not None and ticks.sources[6].signs is not None
    assert torch.equal(windows.sources[10].signs, ticks.sources[6].signs)
    again = calibrated()
    again.restore(windows.state())
    assert again.before[1] == windows.before[1] and torch.equal(again.before[0], windows.before[0])


def test_a_hold_is_the_mean_of_what_was_seen_or_what_goes_on_now():
    holds = Holds(4, 0.5)
    assert (holds.mean(), holds.tau(), holds.bound(6.0)) == (4, 12, 0.5)
    for tick in (6, 16, 26):
        holds.fire(tick)
    assert holds.mean() == (4 + 10 + 10) / 3 and holds.mean(age=99) == 100


def test_signed_ema_keeps_to_the_cap_where_it_is_asked_to():
    merger = SignedEMA(MergerConfig(hold_cap=True))
    merger.holds = Holds(20, 0.5)
    merger.prepare(TRUE, TRUE, age=0)
    assert merger.dose * 0.75 == pytest.approx(12 / 60)
    merger = SignedEMA(MergerConfig(hold_cap=True, dose=0.1))
    merger.holds = Holds(20, 0.5)
    merger.prepare(TRUE, TRUE, age=0)
    assert merger.dose == 0.1


def test_delta_is_spent_at_once_or_in_equal_shares():
    doses = {}
    for spend in ("held", "once", "spread"):
        merger = Delta(MergerConfig(kind="delta", spend=spend))
        merger.holds = Holds(4, 0.5)
        doses[spend] = []
        for age in range(4):
            merger.prepare(TRUE, TRUE, age)
            doses[spend].append(merger.dose)
    assert doses == {"held": [1.0] * 4, "once": [1.0, 0.0, 0.0, 0.0], "spread": [0.25] * 4}


def test_replace_leaves_nothing_of_the_compressed_gradient():
    assert torch.equal(Replace(MergerConfig(kind="replace"))(noisy(1, 0.0), TRUE, age=3), TRUE)


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_a_layout_looks_at_the_coordinates_of_the_whole(stride: int):
    sizes = [10, 3, 50, 1, 20]
    whole = looked_at(sizes, stride)
    parts = [looked_at(sizes[:2], stride), looked_at(sizes[2:], stride) + sum(sizes[:2])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert {0, 10, 13, 63, 64} <= set(whole.tolist()) and looked_at([], stride).size == 0
    assert stride_of(100) == 1 and stride_of(1 << 20) == 16
