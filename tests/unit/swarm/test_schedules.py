"""Fire schedule, snapshot ring and 1F1B order against simulations written from the contract's words."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_service.clock import Lockstep
from anchor_service.config import AnchorConfig
from anchor_service.lag import agenda
from anchor_service.ring import anchor_should_fire, ring_bound
from swarm.pipeline import schedule

LAW = settings(deadline=None, derandomize=True, max_examples=200)
TICKS = 200
CLOCKS = list(itertools.product([1, 2, 3, 5, 7, 10, 20, 33, 199, 250], [1, 2, 3, 5, 7, 20, 50]))  # delay_k, cadence


def fires(delay_k: int, cadence: int) -> list[int]:
    """Ticks counted one by one: every `cadence`-th tick fires once weights `delay_k` ticks old exist."""
    found, since = [], 0
    for tick in range(1, TICKS + 1):
        since += 1
        if since == cadence:
            since = 0
            oldest_age = tick  # before tick T the weights θ_0 … θ_{T-1} exist: ages 1 to T
            if delay_k <= oldest_age:
                found.append(tick)
    return found


def run_clock(delay_k: int, cadence: int) -> tuple[list[tuple[int, int]], int]:
    """A run as the coordinator drives it: offer θ_{T-1} before tick T, then fire if due. Returns fires and the peak."""
    clock = Lockstep(agenda(AnchorConfig(delay_k=delay_k, cadence=cadence), seed=0, last_tick=TICKS))
    taken, held, peak = [], {}, 0
    for tick in range(1, TICKS + 1):
        for due in clock.to_start(tick - 1):
            held[due.version] = tick - 1
        peak = max(peak, len(held))
        if due := clock.due(tick):
            taken.append((tick, held.pop(due.version)))
    assert not held  # nothing is started that the run does not merge
    assert peak <= clock.bound()
    return taken, peak


# --- when the anchor fires ---------------------------------------------------------------------


@pytest.mark.parametrize(("delay_k", "cadence"), CLOCKS)
def test_a_fire_happens_on_every_multiple_of_the_cadence_once_weights_that_old_exist(delay_k: int, cadence: int):
    found = [t for t in range(1, TICKS + 1) if anchor_should_fire(t, cadence, delay_k)]
    assert found == fires(delay_k, cadence)


@pytest.mark.parametrize(("k", "count"), [(20, 10), (5, 40), (1, 200)])
def test_200_ticks_make_10_fires_at_20_and_40_at_5(k: int, count: int):
    assert sum(anchor_should_fire(t, k, k) for t in range(1, TICKS + 1)) == count


def test_no_fire_needs_weights_from_before_the_base_policy():
    assert not any(anchor_should_fire(t, 5, 20) for t in range(20))
    assert anchor_should_fire(20, 5, 20)


# --- the ring ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("delay_k", "cadence"), CLOCKS)
def test_every_fire_finds_the_weights_of_delay_k_ticks_ago(delay_k: int, cadence: int):
    taken, _ = run_clock(delay_k, cadence)
    assert taken == [(tick, tick - delay_k) for tick in fires(delay_k, cadence)]


@pytest.mark.parametrize(("delay_k", "cadence"), CLOCKS)
def test_at_most_delay_over_cadence_snapshots_rounded_up_are_alive(delay_k: int, cadence: int):
    _, peak = run_clock(delay_k, cadence)
    bound = next(n for n in itertools.count() if n * cadence >= delay_k)
    assert ring_bound(cadence, delay_k) == bound
    assert peak <= bound
    if TICKS >= 2 * (delay_k + cadence):
        assert peak == bound  # and it needs as many: the bound is tight


@pytest.mark.parametrize(("delay_k", "cadence"), CLOCKS)
def test_snapshots_are_kept_by_the_cadence_of_m_alone(delay_k: int, cadence: int):
    """No q_cadence enters at all: the agenda does not know it."""
    clock = Lockstep(agenda(AnchorConfig(delay_k=delay_k, cadence=cadence), seed=0, last_tick=TICKS))
    wanted = {s for s in range(TICKS) if clock.to_start(s)}
    assert wanted == {tick - delay_k for tick in fires(delay_k, cadence)}
    assert all((s + delay_k) % cadence == 0 for s in wanted)


# --- 1F1B --------------------------------------------------------------------------------------


GRIDS = [(pp, n) for pp in range(1, 7) for n in [0, 1, 2, 3, 4, 5, 8, 13]]


@pytest.mark.parametrize(("pp", "n"), GRIDS)
def test_each_stage_runs_each_microbatch_once_forward_then_once_backward(pp: int, n: int):
    for p in range(pp):
        order = schedule(p, pp, n)
        assert sorted(order) == sorted([("F", i) for i in range(n)] + [("B", i) for i in range(n)])
        for i in range(n):
            assert order.index(("F", i)) < order.index(("B", i))


@pytest.mark.parametrize(("pp", "n"), GRIDS)
def test_stage_p_never_has_more_than_pp_minus_p_microbatches_alive(pp: int, n: int):
    for p in range(pp):
        alive = peak = 0
        for step, _ in schedule(p, pp, n):
            alive += 1 if step == "F" else -1
            peak = max(peak, alive)
        assert peak == min(pp - p, n)


def clocked(pp: int, n: int) -> int:
    """All stages run their orders, one step a time unit, waiting for what the neighbour sends; links keep order.

    Returns the time units. Fails on a deadlock and if a message is not of the microbatch that waits for it.
    """
    orders = [deque(schedule(p, pp, n)) for p in range(pp)]
    up, down = [deque() for _ in range(pp + 1)], [deque() for _ in range(pp + 1)]  # into stage p from below, above
    time = 0
    while any(orders):
        sent = []
        for p, order in enumerate(orders):
            if not order:
                continue
            step, i = order[0]
            inbox = None
            if step == "F" and p > 0:
                inbox = up[p]
            elif step == "B" and p < pp - 1:
                inbox = down[p]
            if inbox is not None:
                if not inbox:
                    continue  # blocked
                assert inbox.popleft() == i
            order.popleft()
            sent.append((up, p + 1, i) if step == "F" else (down, p - 1, i))
        assert sent, f"deadlock after {time} units: {[list(o)[:2] for o in orders]}"
        for link, to, i in sent:
            if 0 <= to < pp:
                link[to].append(i)
        time += 1
    return time


@LAW
@given(st.integers(1, 8), st.integers(0, 20))
def test_blocking_stages_never_deadlock_and_idle_no_longer_than_one_fill_and_drain(pp: int, n: int):
    assert clocked(pp, n) == (2 * n + 2 * (pp - 1) if n else 0)


def test_backward_starts_before_all_forwards_are_done():
    """What tells 1F1B from running all forwards first."""
    assert schedule(0, 2, 4) == [(step, int(i)) for step, i in "F0 F1 B0 F2 B1 F3 B2 B3".split()]
    assert schedule(1, 2, 4) == [(step, int(i)) for step, i in "F0 B0 F1 B1 F2 B2 F3 B3".split()]
