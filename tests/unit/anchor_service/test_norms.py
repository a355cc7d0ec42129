"""A correction is measured by the norms of those before it."""

from __future__ import annotations

import math

import pytest

from anchor_service.norms import ENOUGH, REMEMBERED, NormHistory


def test_nothing_is_refused_before_enough_are_known_but_what_is_no_number():
    history = NormHistory(10.0)
    for norm in [1.0, 1e6, 1.0, 1e-6][: ENOUGH - 1]:
        assert history.judge(norm, 1) == ""
    for norm in (math.nan, math.inf):
        assert "norm is" in history.judge(norm, 1) and len(history.taken) == ENOUGH - 1


def test_beyond_so_many_times_the_median_it_is_refused_and_not_remembered():
    history = NormHistory(10.0)
    history.taken.extend([1.0, 1.0, 2.0, 3.0, 30.0])
    assert history.judge(20.0, 1) == ""
    says = "norm 26 is 10.4 times what is usual, 2.5, by the last 6 and by the swarm's own gradients, beyond anchor.norm_bound 10"
    for _ in range(REMEMBERED):  # however often it is said
        assert says in history.judge(26.0, 1)
    assert len(history.taken) == 6


@pytest.mark.parametrize("blank", [0, 30])
def test_a_norm_that_moves_is_followed_and_batches_without_an_advantage_say_nothing(blank: int):
    history = NormHistory(10.0)
    for norm in [1.0] * REMEMBERED + [0.0] * blank + [9.0] * (REMEMBERED // 2 + 1) + [80.0] * 3:
        assert history.judge(norm, 1) == ""
    assert len(history.taken) == REMEMBERED


def test_what_the_swarm_itself_had_is_no_lie_nor_is_what_m_bar_keeps_of_it():
    """The gradients of a soak, near convergence: the swarm's own 0.7, and 9.7 in one batch that has any."""
    history, m_bar = NormHistory(10.0), 0.0
    for tick in range(1, 60):
        own, m = (9.7, 26.0) if tick == 30 else (0.7, 0.3)
        history.saw(tick, own)
        m_bar = 0.5 * m_bar + 0.5 * m
        assert history.judge(m_bar, tick - 1) == ""
    assert "by the swarm's own gradients" in history.judge(100.0, 59)  # a lie in a tick that was like the others
    assert len(history.taken) == REMEMBERED


def test_of_the_swarm_s_own_norms_those_count_that_a_window_replays_and_none_is_kept_for_long():
    history = NormHistory(10.0)
    for tick in range(1, 101):
        history.saw(tick, 9.7 if tick == 97 else 0.7)
        if tick % 5 == 0:
            assert history.judge(26.0 if tick == 100 else 0.3, tick - 1) == "" and not history.own
