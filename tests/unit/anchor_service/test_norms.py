"""A correction is measured by the norms of those before it."""

from __future__ import annotations

import math

import pytest

from anchor_service.norms import ENOUGH, REMEMBERED, NormHistory


def test_nothing_is_refused_before_enough_are_known_but_what_is_no_number():
    history = NormHistory(10.0)
    for norm in [1.0, 1e6, 1.0, 1e-6][: ENOUGH - 1]:
        assert history.judge(norm) == ""
    for norm in (math.nan, math.inf):
        assert "norm is" in history.judge(norm) and len(history.taken) == ENOUGH - 1


def test_beyond_so_many_times_the_median_it_is_refused_and_not_remembered():
    history = NormHistory(10.0)
    history.taken.extend([1.0, 1.0, 2.0, 3.0, 30.0])
    assert history.judge(20.0) == ""
    for _ in range(REMEMBERED):  # however often it is said
        assert "norm 26 is 10.4 times the median 2.5 of the last 6, beyond anchor.norm_bound 10" in history.judge(26.0)
    assert len(history.taken) == 6


@pytest.mark.parametrize("blank", [0, 30])
def test_a_norm_that_moves_is_followed_and_batches_without_an_advantage_say_nothing(blank: int):
    history = NormHistory(10.0)
    for norm in [1.0] * REMEMBERED + [0.0] * blank + [9.0] * (REMEMBERED // 2 + 1) + [80.0] * 3:
        assert history.judge(norm) == ""
    assert len(history.taken) == REMEMBERED
