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


def run(merger: Calibrated, ticks: range, signal: float = 0.3, kept: float = 1.0) -> list[float]:
    """The share in each of these ticks. Fires start at 2, 6, 10 …, each merged DELAY ticks later, its signs as M's.

    `signal`: how much of the truth an M has. `kept`: what a compressed gradient has of the M of its own tick.
    """
    shares = []
    for t in ticks:
        merger.watch(compressed(t, signal, kept), t - 1 if (t - 1) % CADENCE == 2 else None)
        source = t - DELAY
        if source >= 2 and (source - 2) % CADENCE == 0:
            merger.holds.fire(t)
            merger.learn(source, noisy(source + 1, signal).sign().char(), list)
        if t >= 2 + DELAY:
            merger.prepare(TRUE, TRUE, age=(t - DELAY - 2) % CADENCE)
            shares.append(merger.dose)
    return shares


def compressed(tick: int, signal: float, kept: float) -> torch.Tensor:
    return kept * noisy(tick, signal) + math.sqrt(1 - kept**2) * noisy(10_000 + tick, 0.0)


def slow_share(ticks: int, signal: float, kept: float, cap: float = 12.0, prior: float = 0.03) -> float:
    """In the last of `ticks`, by the formula of the docstring."""
    fires = [s for s in range(2, ticks, CADENCE) if s + DELAY <= ticks]
    m = {s: np.sign(noisy(s + 1, signal).double().numpy()) for s in range(2, ticks, CADENCE)}
    g = {s: np.sign(compressed(s + 1, signal, kept).double().numpy()) for s in fires}
    f = float(np.mean([np.mean(m[s] * g[s]) for s in fires]))
    pairs, weights = 20 * prior, 20.0
    for s in fires:
        for k, earlier in enumerate(reversed([o for o in m if o + DELAY <= s])):  # older ones count less
            pairs, weights = pairs + 0.9**k * float(np.mean(m[s] * m[earlier])), weights + 0.9**k
    a, tau = pairs / weights, CADENCE * 1.5 / 0.5
    if a <= 0 or f <= 3 / math.sqrt(len(fires) * N):
        return 0.0
    r = min(1, a / (prior / 2)) / math.sqrt(1 / 3 + 2 / 3 * math.sin(math.pi * a / 2)) / (f * tau)
    return min(0.75, cap / tau, r / (1 + r))


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("signal", [0.1, 0.5])
@pytest.mark.parametrize("ticks", [9, 12, 40])
def test_the_share_is_that_of_the_formula(ticks: int, signal: float, kept: float):
    share = run(calibrated(), range(1, ticks + 1), signal, kept)[-1]
    assert share == pytest.approx(slow_share(ticks, signal, kept), rel=1e-5)
    assert (share > 0) == (kept > 0)


def test_an_anchor_that_disagrees_with_itself_gets_nothing_and_leaves_the_gradient_as_it_is():
    merger = calibrated(prior=-0.2)
    assert set(run(merger, range(1, 40), signal=0.0)) == {0.0} and not merger.wants()
    g = noisy(5, 0.1)
    g[::7] = -0.0
    assert torch.equal(merger(g, TRUE, age=0).view(torch.int32), g.view(torch.int32))


def test_an_anchor_of_other_samples_gets_nothing_however_well_it_agrees_with_itself():
    """Signs of nothing, and those of a direction of its own."""
    own = torch.randn(N, generator=torch.Generator().manual_seed(77))
    for signs in (lambda s: noisy(10_000 + s, 0.0), lambda s: own + noisy(10_000 + s, 0.0)):
        merger = calibrated()
        for t in range(1, 40):
            merger.watch(noisy(t, 0.3), t - 1)
            merger.learn(t - 1, signs(t).sign().char(), list)
            assert not merger.wants()


def test_what_agrees_less_and_less_with_itself_fades_and_is_gone_where_it_does_not():
    """Every pair of M agrees by `a`, whatever the codec leaves of each."""
    shares = []
    for a in (0.05, 0.015, 0.01, 0.005, 0.001, -0.001, -0.01):
        merger = calibrated()
        merger.seen.compressed.add(0.5, N)
        merger.seen.anchor.add(a, 1e9)
        shares.append(merger.share(0))
    assert shares[:2] == pytest.approx([shares[1]] * 2, rel=0.1)
    assert shares[1] > shares[2] > shares[3] > shares[4] > shares[5] == shares[6] == 0 and shares[4] < 0.1 * shares[1]


def test_the_first_fire_is_merged_by_what_the_codec_leaves_of_it():
    merger = calibrated()
    assert merger.share(0) == 0.0
    merger.watch(noisy(1, 0.3), 0)
    merger.holds.fire(6)
    merger.learn(0, noisy(1, 0.3).sign().char(), list)
    r = 1 / math.sqrt(1 / 3 + 2 / 3 * math.sin(math.pi * 0.03 / 2)) / 12
    assert merger.share(0) == pytest.approx(r / (1 + r))


def test_a_good_codec_keeps_more_of_itself_than_a_poor_one_and_a_long_hold_takes_less():
    good, poor = (run(calibrated(), range(1, 60), kept=kept)[-1] for kept in (1.0, 0.1))
    assert 0 < good < 0.15 and poor == pytest.approx(0.5, abs=0.2)
    merger = calibrated()
    run(merger, range(1, 60), kept=0.5)
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

    with pytest.raises(ValueError, match="followed an earlier rule: start a new run"):
        second.restore({"average": TRUE})

    halves = [calibrated(), calibrated()]
    numbers: list[list[float]] = []
    for t in range(1, 10):
        for k, half in enumerate(halves):
            half.watch(noisy(t, 0.3).chunk(2)[k], t - 1 if t == 3 else None)
    m = noisy(3, 0.3).sign().char().chunk(2)
    halves[0].learn(2, m[0], lambda found: numbers.append(found) or found)
    halves[1].learn(2, m[1], lambda found: [a + b for a, b in zip(found, numbers[0])])
    one = calibrated()
    for t in range(1, 10):
        one.watch(noisy(t, 0.3), t - 1 if t == 3 else None)
    one.learn(2, torch.cat(m), list)
    assert halves[1].share(0) == pytest.approx(one.share(0), rel=1e-12) and one.share(0) > 0


@pytest.mark.parametrize("windows", [False, True])
def test_an_m_of_a_share_of_the_samples_tells_the_same_of_the_codec(windows: bool):
    """A mini-batch is the sum of its samples, each one drawing: of 16, M is of four, of one tick's or of all four ticks'."""

    def fresh() -> Calibrated:
        merger = calibrated()
        merger.windows, merger.replayed = windows, 0.25
        return merger

    g, merger = torch.Generator().manual_seed(0), fresh()
    for t in range(200):
        samples = torch.randn(CADENCE, 16, N, generator=g)
        for k, tick in enumerate(samples):
            noise = math.sqrt(0.75) * 4 * torch.randn(N, generator=g)
            merger.watch(0.5 * tick.sum(0) + noise, t if k == CADENCE - 1 else None)
            if (t, k) == (20, 1):  # in the middle of a window
                state = {name: tensor.clone() for name, tensor in merger.state().items()}
                merger = fresh()
                merger.restore(state)
        m = (samples[:, 0] if windows else samples[-1, :4]).sum(0)
        merger.learn(t, m.sign().char(), list)
    part = 0.25 if windows else 0.5  # √o
    expected, whole = 2 / math.pi * math.asin(0.5 * part) / part, 2 / math.pi * math.asin(0.5)
    assert merger.seen.compressed.value == pytest.approx(expected, abs=0.01) and expected == pytest.approx(
        whole, rel=0.06
    )


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
