"""When Q is refreshed: before the forward of which ticks."""

from __future__ import annotations

import pytest

from codec.schedule import q_should_refresh

TICKS = 200


@pytest.mark.parametrize("q_cadence", [1, 2, 3, 5, 20, 1000])
def test_q_is_refreshed_on_its_own_cadence_and_once_more_before_tick_2(q_cadence: int):
    found = [t for t in range(1, TICKS + 1) if q_should_refresh(t, q_cadence)]
    multiples = range(q_cadence, TICKS + 1, q_cadence)
    assert found == sorted({2, *multiples} - {1})  # tick 1 has no tick before it to take statistics from
