"""What is usual is judged by what was seen, from the third of a kind on, and never beyond the configured deadline."""

from __future__ import annotations

import math

import pytest

from swarm.config import FaultsConfig
from swarm.pace import DUE_TICK, FIRE, REMEMBERED, SEEN, Pace

LIMIT = 300.0, "swarm.timeout_s"


def pace(*took: float, **faults: float) -> Pace:
    found = Pace(FaultsConfig(**faults))
    for seconds in took:
        found.observe("tick", seconds)
    return found


def test_nothing_is_judged_before_enough_were_seen():
    for n in range(SEEN):
        early = pace(*[30.0] * n)
        assert early.usual("tick") is None and early.slow_after("tick") == math.inf
        assert early.hung_after("tick", LIMIT) == LIMIT
    assert pace(*[30.0] * SEEN).usual("tick") == 30.0


def test_one_that_hangs_is_slow_within_thrice_the_usual_time_less_the_second_of_the_look():
    """The bar, at default settings, wherever what is asked for takes a second or more; below it is two seconds."""
    for usual in (0.01, 1.0, 5.0, 40.0):
        assert pace(*[usual] * 5).slow_after("tick") + 1.0 <= max(3 * usual, 3.0)


def test_a_first_one_that_compiles_is_not_what_is_usual():
    assert pace(90.0, 2.0, 2.0).usual("tick") == 2.0


def test_the_newest_say_what_is_usual():
    assert pace(*[1.0] * 50, *[9.0] * (REMEMBERED // 2 + 1)).usual("tick") == 9.0


def test_a_tick_that_may_wait_for_a_fire_hangs_no_earlier_than_the_fire_would():
    found = pace()
    for _ in range(3):
        found.observe(DUE_TICK, 2.0)
    assert found.hung_after(DUE_TICK, (900.0, "both")) == (900.0, "both")  # of fires nothing was seen
    for _ in range(3):
        found.observe(FIRE, 30.0)
    assert found.hung_after(DUE_TICK, (900.0, "both")) == (600.0, "faults.hang_factor")
    assert found.slow_after(DUE_TICK) == 4.0


def test_kinds_know_nothing_of_each_other():
    found = pace(2.0, 2.0, 2.0)
    assert found.usual("weights") is None and found.usual("tick") == 2.0


@pytest.mark.parametrize(
    ("usual", "after", "knob"),
    [
        (0.1, 60.0, "faults.hang_floor_s"),
        (10.0, 200.0, "faults.hang_factor"),
        (14.99, 299.8, "faults.hang_factor"),
        (16.0, 300.0, "swarm.timeout_s"),
    ],
)
def test_the_knob_that_is_named_is_the_one_that_decided(usual: float, after: float, knob: str):
    seconds, named = pace(*[usual] * 3).hung_after("tick", LIMIT)
    assert seconds == pytest.approx(after) and named == knob


def test_a_floor_above_the_deadline_does_not_move_it():
    assert pace(1.0, 1.0, 1.0, hang_floor_s=900.0).hung_after("tick", LIMIT) == LIMIT


def test_what_may_wait_for_a_reward_hangs_so_much_later_and_nothing_else_does():
    found = Pace(FaultsConfig(), {"generate train": 100.0})
    for kind in ("generate train", "tick") * SEEN:
        found.observe(kind, 1.0)
    assert found.hung_after("generate train", LIMIT)[0] == 160.0 and found.hung_after("tick", LIMIT)[0] == 60.0
