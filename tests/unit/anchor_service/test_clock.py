"""Lockstep and wall: which fires start when, and how many are under way."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_service.clock import Lockstep, Wall, make_clock
from anchor_service.config import AnchorConfig
from anchor_service.lag import Due, agenda, make_draw

TICKS = 150
LAW = settings(deadline=None, derandomize=True, max_examples=100)
KINDS = [
    {"kind": "fixed"},
    {"kind": "uniform", "low": 1.0, "high": 15.0},
    {"kind": "lognormal", "mean": 6.0, "sigma": 0.8},
    {"kind": "markov", "slow": 30.0, "p_slow": 0.3},
    {"kind": "outage", "every": 30, "length": 10},
]


def anchor(lag: dict, **keys: object) -> AnchorConfig:
    return AnchorConfig.model_validate({"lag": lag, **keys})


def drive(clock: Lockstep, ticks: int = TICKS) -> tuple[list[Due], list[Due], int]:
    """As the coordinator does: offer before each tick, merge in it. Returns started, merged, most under way."""
    started, merged, alive, most = [], [], set(), 0
    for tick in range(1, ticks + 1):
        for due in clock.to_start(tick - 1):
            assert due.source_tick == tick - 1
            started.append(due)
            alive.add(due.version)
        most = max(most, len(alive))
        if due := clock.due(tick):
            assert due.version in alive  # it had started
            merged.append(due)
            alive = {v for v in alive if v > due.version}
    return started, merged, most


# --- lockstep ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cadence", [1, 2, 5])
@pytest.mark.parametrize("lag", KINDS, ids=lambda lag: lag["kind"])
def test_every_fire_of_the_agenda_starts_once_at_its_source_and_is_due_once(lag: dict, cadence: int):
    dues = agenda(anchor(lag, cadence=cadence), 0, TICKS)
    started, merged, _ = drive(Lockstep(dues))
    assert started == sorted(dues, key=lambda d: d.source_tick)
    assert merged == dues


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cadence", [1, 2, 5])
@pytest.mark.parametrize("lag", KINDS, ids=lambda lag: lag["kind"])
def test_the_bound_is_reached_and_never_passed(lag: dict, cadence: int, seed: int):
    clock = Lockstep(agenda(anchor(lag, cadence=cadence), seed, TICKS))
    _, _, most = drive(clock)
    assert most == clock.bound() > 0


def test_an_empty_agenda_starts_nothing():
    clock = Lockstep([])
    assert drive(clock) == ([], [], 0) and clock.bound() == 0


def test_a_fire_that_is_never_merged_starts_and_stays_within_the_bound():
    clock = Lockstep([Due(1, 0, 3), Due(2, 1, None), Due(3, 2, 5)])
    started, merged, most = drive(clock, 10)
    assert [d.version for d in started] == [1, 2, 3] and [d.version for d in merged] == [1, 3]
    assert most <= clock.bound()


@pytest.mark.parametrize("cadence", [2, 5])
@pytest.mark.parametrize("lag", KINDS, ids=lambda lag: lag["kind"])
def test_a_resumed_clock_needs_what_started_and_is_not_merged_yet(lag: dict, cadence: int):
    dues = agenda(anchor(lag, cadence=cadence), 0, TICKS)
    for tick in range(0, TICKS, 7):
        clock = Lockstep(dues)
        begun = {d.version for t in range(tick) for d in clock.to_start(t)}
        done = {d.version for t in range(1, tick + 1) if (d := clock.due(t))}
        assert clock.resume(tick, newest=0) == begun - done


def test_lockstep_waits_and_finished_changes_nothing():
    clock = Lockstep([Due(1, 0, 3)])
    clock.finished(1)
    assert clock.waits and clock.to_start(0) == [Due(1, 0, 3)] and clock.due(3) == Due(1, 0, 3)


# --- wall --------------------------------------------------------------------------------------


def wall(workers: int = 1, lag: dict | None = None) -> Wall:
    return Wall(workers, make_draw(anchor(lag or {"kind": "fixed"}), 0))


@LAW
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_at_most_one_fire_a_tick_at_most_one_a_worker_and_versions_count(workers: int, seed: int):
    rng, clock, running, versions = random.Random(seed), wall(workers), set(), []
    for tick in range(200):
        free = len(running) < workers
        found = clock.to_start(tick)
        assert len(found) <= free and (workers > 1 or len(found) == free)  # one worker: whenever it is free
        for due in found:
            assert (due.source_tick, due.first_tick) == (tick, None)
            running.add(due.version)
            versions.append(due.version)
        assert len(running) <= workers
        for version in [v for v in running if rng.random() < 0.2]:
            clock.finished(version)
            running.discard(version)
    assert versions == list(range(1, len(versions) + 1))


def test_what_is_offered_while_all_are_busy_is_let_go():
    clock = wall(1)
    assert clock.to_start(0) == [Due(1, 0, None)]
    assert not any(clock.to_start(t) for t in range(1, 20))
    clock.finished(1)
    assert clock.to_start(20) == [Due(2, 20, None)]  # the newest weights, not those of tick 1


def test_finishing_frees_one_slot_even_if_it_is_said_twice():
    clock = wall(2)
    assert [d.version for t in range(4) for d in clock.to_start(t)] == [1, 2]
    clock.finished(1)
    clock.finished(1)
    assert [d.version for t in range(4, 8) for d in clock.to_start(t)] == [3]


@pytest.mark.parametrize(("workers", "takes"), [(1, 7), (2, 7), (2, 20), (3, 9), (10, 20), (4, 3)])
@pytest.mark.parametrize("slows", [True, False])
def test_several_workers_take_even_turns(workers: int, takes: int, slows: bool):
    """Whether the lag model says how long a fire takes, or the first ones that are done."""
    clock = Wall(workers, make_draw(anchor({"kind": "uniform", "low": takes, "high": takes}), 0), slows=slows)
    done, starts = {}, []
    for tick in range(200):
        for version in [v for v, end in done.items() if end <= tick]:
            clock.finished(version)
            del done[version]
        for due in clock.to_start(tick):
            done[due.version] = tick + takes
            starts.append(tick)
    gaps = {b - a for a, b in pairwise(starts) if a >= 3 * takes}
    assert gaps <= {max(1, takes // workers), max(1, takes // workers) + takes % workers}
    assert len(starts) >= (200 - 3 * takes) // max(1, takes / workers)


def test_an_outage_starts_nothing_and_uses_up_no_version():
    clock = wall(1, {"kind": "outage", "every": 30, "length": 10})
    for tick in range(120):
        found = clock.to_start(tick)
        assert bool(found) == (tick % 30 < 20)
        for due in found:
            clock.finished(due.version)
    assert clock.version == 80


def test_only_usable_weights_start_a_fire():
    clock = Wall(1, make_draw(anchor({"kind": "fixed"}), 0), lambda source: source % 2 == 0)
    for tick in range(10):
        assert bool(clock.to_start(tick)) == (tick % 2 == 0)
        clock.finished(clock.version)


def test_a_fire_is_slowed_by_the_draw_that_let_it_start():
    config = anchor({"kind": "lognormal", "mean": 6.0})
    clock, draw = wall(1, {"kind": "lognormal", "mean": 6.0}), make_draw(config, 0)
    for number in range(20):
        (due,) = clock.to_start(number)
        assert clock.lag_of(due.version - 1, due.source_tick) == draw(number, number)
        clock.finished(due.version)


def test_a_resumed_wall_goes_on_after_the_newest_version_with_all_workers_free():
    clock = wall(1)
    assert clock.resume(40, newest=7) == set()
    assert clock.to_start(40) == [Due(8, 40, None)]
    assert clock.bound() is None and clock.due(41) is None and not clock.waits


# --- the choice --------------------------------------------------------------------------------


def test_the_config_chooses_the_clock():
    lockstep = make_clock(anchor({"kind": "fixed"}, delay_k=3, cadence=4), 0, 40, 2)
    assert isinstance(lockstep, Lockstep) and [t for t in range(41) if lockstep.due(t)] == list(range(4, 41, 4))
    assert isinstance(make_clock(anchor({"kind": "fixed"}, clock="wall"), 0, 40, 2), Wall)


def test_with_shared_weights_fires_start_where_the_engines_get_theirs():
    clock = make_clock(anchor({"kind": "fixed"}, clock="wall", weights="shared"), 0, 40, 4)
    for tick in range(20):
        assert bool(clock.to_start(tick)) == (tick % 4 == 0)
        clock.finished(clock.version)
