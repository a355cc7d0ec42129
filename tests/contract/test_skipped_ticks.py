"""A tick with bad numbers is left out by all ranks: what follows has the same bits as if the tick had not been.

Neither weights nor Adam, nor what replicas owe each other, nor statistics of a codec know of it. What the schedule brings in
that tick comes: a refreshed Q, a correction, which ages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.errors import NotFinite
from anchor_service.messages import Correction
from codec.config import CodecConfig, GradientConfig
from codec.frames import FrameError
from merger.config import MergerConfig
from swarm.messages import MergeOutcome, TickPlan, TickReport
from swarm.nonfinite import MOST_SKIPPED, Skips
from swarm.rank import MiniBatch, Rank, build_rank
from swarm.tick import tick
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank, mini_batch

NAN, TICKS = float("nan"), 6
OWED = GradientConfig(kind="powersgd", rank=2), GradientConfig(kind="sparse", bits=2.0)
CODECS = {
    "powersgd": CodecConfig(kind="powersgd", rank=8, gradient=OWED[0]),
    "random_k": CodecConfig(kind="random_k", rank=8, gradient=OWED[0]),
    "transform": CodecConfig(kind="transform", total_rate=0.3, gradient=OWED[1]),
}


def _advantages(rank: Rank, mini: MiniBatch) -> None:
    """Of the longest sample, which is dealt to the first replica: its last stage alone makes something of them."""
    if rank.grid.d == 0:
        mini.micros[0].advantages[0] = float("inf")


def _engine(rank: Rank, mini: MiniBatch) -> None:
    """With old log-probs of the trainer neither loss nor gradient would show it."""
    mini.old_logprobs = None
    mini.micros[0].rollout_logprobs[0] = NAN


def _overflow(rank: Rank, mini: MiniBatch) -> Callable[[], None] | None:
    """Within a layer of the first stage of one replica: the codec has to send what comes of it."""
    if (rank.grid.d, rank.grid.p) != (0, 0):
        return None
    return rank.stage.layers[0].register_forward_hook(lambda m, given, made: made * float("inf")).remove


def _plan(rank: Rank, t: int) -> TickPlan:
    due = {2: (1, 0), 3: (2, 1)}.get(t)
    signs = torch.randn(rank.stage.weights.numel, generator=torch.Generator().manual_seed(t)).sign()
    correction = None if due is None else Correction(*due, None, signs, "")
    return TickPlan(t, 0, correction, min(2, t - 1))


def _quiet(rank: Rank, plan: TickPlan) -> None:
    """What the schedule brings in a tick, and no tick."""
    if rank.bases.due(plan.tick):
        rank.bases.refresh(plan.tick)
    if plan.correction is not None:
        rank.held.receive(plan.version, lambda: plan.correction)
    rank.held.agree(plan)
    rank.held.skip(plan)


def _go(rank: Rank, bad: int, poison: Callable | None) -> list[NotFinite]:
    """TICKS ticks, of which `bad` is poisoned, or left out; what was said of it."""
    found = []
    for t in range(1, TICKS + 1):
        plan, mini = _plan(rank, t), mini_batch(rank, make_batch(seed=t))
        if t == bad and poison is None:
            _quiet(rank, plan)
            continue
        healed = poison(rank, mini) if t == bad else None
        report = tick(rank, plan, mini, lambda c: c)
        assert (report.skipped is not None) == (t == bad)
        if report.skipped is not None:
            assert report.values == {"actor/skipped": 1.0} and not report.merge.merged
            assert report.merge.version == (min(2, t - 1) or None)
            found.append(report.skipped)
        if healed is not None:
            healed()
    return found


def _both(rank: int, init: str, folder: Path, codec: CodecConfig, grid: tuple[int, int], bad: int, poison: Callable):
    """What differs between the run with a bad tick and the one without it; and what was said."""
    one = make_rank(folder, rank, *grid, codec=codec, merger=MergerConfig(), init=init)
    other = build_rank(one.setup, one.grid)
    said = _go(one, bad, poison)
    _go(other, bad, None)
    (tensors, fields), (expected, others) = one.state(), other.state()
    assert tensors.keys() == expected.keys() and fields == others
    return [k for k in tensors if not torch.equal(tensors[k], expected[k])], [(e.first, e.secondhand) for e in said]


@pytest.mark.parametrize(
    ("name", "bad", "poison", "first"),
    [
        ("powersgd", 3, _advantages, "the advantages of the samples"),
        ("powersgd", 4, _engine, "the log-probs that the engine recorded"),  # in a tick that refreshes Q
        ("random_k", 3, _advantages, "the advantages of the samples"),
        ("transform", 3, _overflow, "the forward pass: what layer 0 gives"),
        ("transform", 1, _advantages, "the advantages of the samples"),
    ],
)
def test_a_tick_that_is_skipped_leaves_nothing(untied_model: Path, name: str, bad: int, poison: Callable, first: str):
    differing, said = _both(0, "", untied_model, CODECS[name], (1, 1), bad, poison)
    assert not differing and said == [(first, False)]


@pytest.mark.parametrize(
    ("name", "poison", "first"),
    [
        ("powersgd", _advantages, "the advantages of the samples"),
        ("transform", _overflow, "the forward pass: what layer 0 gives"),
    ],
)
def test_nor_in_a_grid_where_one_rank_alone_sees_it(tied_model: Path, name: str, poison: Callable, first: str):
    found = on_ranks(4, _both, tied_model, CODECS[name], (2, 2), 3, poison)
    assert [differing for differing, _ in found] == [[]] * 4
    said = [said for _, said in found]
    assert said[:2] == [[(first, False)]] * 2 and all(other[0][1] for other in said[2:])


def _report(error: NotFinite | None) -> TickReport:
    return TickReport({}, {}, {}, {}, MergeOutcome(), error)


def test_ticks_in_a_row_stop_the_run_and_a_good_one_between_begins_anew():
    error, other = NotFinite("a", "b", "c"), NotFinite("d", "e", "f")
    other.secondhand = True
    skips = Skips()
    for _ in range(2):
        for n in range(1, MOST_SKIPPED):
            assert skips.judge([_report(other), _report(error)]) is error and skips.in_a_row == n
        assert skips.judge([_report(None)]) is None
    with pytest.raises(NotFinite, match="First seen in b") as caught:
        for _ in range(MOST_SKIPPED):
            skips.judge([_report(error)])
    assert caught.value.__notes__ == [
        f"{MOST_SKIPPED} ticks in a row could not be used: nothing was trained since before the first"
    ]


# --- corrections -----------------------------------------------------------------------------------


def _damaged() -> Correction:
    raise FrameError("the anchor", "digest", "is another")


def _refusals(rank: int, init: str, folder: Path) -> list[tuple]:
    """Version 2 reaches one rank damaged, version 3 is of a source that is still to come, version 4 is good."""
    state = make_rank(folder, rank, 2, 1, merger=MergerConfig(), init=init)
    signs, found = torch.ones(state.stage.weights.numel), []
    for t in range(1, 6):
        if t < 5:
            good = Correction(t, {3: 9}.get(t, t - 1), None, signs, "")
            state.held.receive(t, _damaged if (t, rank) == (2, 1) else lambda good=good: good, waits=False)
        report = tick(state, TickPlan(t, 0, None, None), mini_batch(state, make_batch(seed=t)), lambda c: c)
        found.append((report.merge.version, report.merge.refused, report.merge.age, report.merge.merged))
    return found


def test_a_correction_that_one_rank_cannot_use_is_passed_over_by_all_and_the_held_one_ages(untied_model: Path):
    for found in on_ranks(2, _refusals, untied_model):
        assert found == [(1, None, 0, True), (1, 2, 1, True), (1, 3, 2, True), (4, None, 0, True), (4, None, 1, True)]


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_in_lockstep_it_is_void_or_ends_the_run(untied_model: Path, on_nan: str):
    state = make_rank(untied_model, merger=MergerConfig(), on_nan=on_nan)

    def fetch(_: object) -> Correction:
        raise NotFinite("the anchor: its gradient at the weights of tick 0 is not finite", "its own passes", "float32")

    plan, mini = TickPlan(1, 0, object(), 1), mini_batch(state, make_batch())
    if on_nan == "stop":
        with pytest.raises(NotFinite, match="the anchor"):
            tick(state, plan, mini, fetch)
        return
    report = tick(state, plan, mini, fetch)
    assert report.skipped is None and report.merge.refused == 1 and "the anchor: its gradient" in report.merge.reason
    other = replace(plan, tick=2, correction=None)
    assert tick(state, other, mini, fetch).merge.refused is None  # version 1 counts as seen


def test_values_far_larger_than_those_before_are_refused_where_nothing_waits(untied_model: Path):
    state = make_rank(untied_model, merger=MergerConfig(kind="replace"))
    n = state.stage.weights.numel
    for version in range(1, 8):
        values = torch.full((n,), 1e3 if version == 6 else 1.0)
        state.held.receive(version, lambda v=version, x=values: Correction(v, v - 1, None, x, ""), waits=False)
    waiting = state.held.inbox.waiting()
    assert [v for v, c in waiting.items() if isinstance(c, str)] == [6] and "anchor.norm_bound" in waiting[6]
    np.testing.assert_array_equal(list(waiting), range(1, 8))
