"""Old log-probs without a pass of their own: the tick computes the same ones, to the bit, where no table is new."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from codec.config import CodecConfig
from rl import mismatch
from rl.batch import deal
from rl.config import GrpoConfig
from rl.objective import microbatches
from swarm.messages import TickPlan
from swarm.rank import Rank
from swarm.shares import shares
from swarm.telemetry import combine
from swarm.worker import Worker
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank

CODECS = {
    "none": CodecConfig(kind="none"),
    "powersgd": CodecConfig(kind="powersgd", rank=8),
    "random_k": CodecConfig(kind="random_k", rank=8),
    "fixed": CodecConfig(coder="fixed", total_rate=0.2),
    "entropy": CodecConfig(coder="entropy", total_rate=0.2),
}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
MINIS = [make_batch(seed=s) for s in range(6)]


class Alone(Worker):
    """A worker around a rank that is there, without Ray. `passes`: always one, as before there was a choice."""

    def __init__(self, rank: Rank, passes: bool):
        self.rank, self.passes = rank, passes

    def _old_logprobs(self, index: int, micros: list, refreshed: bool) -> list | None:
        return super()._old_logprobs(index, micros, refreshed or self.passes)


def _steps(rank: int, init: str, options: dict, size: int, passes: bool, old: str, steps: int) -> dict:
    """`steps` steps of `size` ticks each."""
    grpo = GrpoConfig(lr=1e-3, train_batch_size=8 * size, old_logprobs=old)
    state = make_rank(rank=rank, init=init, grpo=grpo, **options)
    worker, told, forwards = Alone(state, passes), [], []
    for step in range(steps):
        minis = MINIS[step * size : (step + 1) * size]
        first = step * size + 1
        found = shares(minis, options["dp"], options["pp"])
        frame = [share.frame for share in found for _ in range(share.ranks)][rank]
        told.append(("begin", worker.begin_step(first, frame)[0]))
        forwards.append(told[-1][1].ledger.get("boundary_fwd", (0.0, 0.0))[0])
        for i in range(size):
            report = worker.tick(TickPlan(first + i, i, None, 0))
            told.append((f"tick {i}", report))
    return {"flat": state.stage.weights.master.detach().numpy().copy(), "told": told, "forwards": forwards}


def _run(folder: Path, codec: str, layout: tuple[int, int], passes: bool, old="trainer", size=2, steps=3) -> list[dict]:
    dp, pp = layout
    options = dict(folder=folder, dp=dp, pp=pp, codec=CODECS[codec], q_cadence=3)
    return on_ranks(dp * pp, _steps, options, size, passes, old, steps)


@pytest.mark.parametrize(("codec", "layout"), [*product(["none", "powersgd"], LAYOUTS), ("random_k", (2, 2))])
def test_a_run_ends_with_the_same_weights_with_and_without_the_pass(model: Path, codec: str, layout: tuple[int, int]):
    """Six ticks, tables refreshed before ticks 2, 3 and 6: the second of three steps begins with tick 3."""
    with_pass, without = (_run(model, codec, layout, passes) for passes in (True, False))
    for ours, theirs in zip(without, with_pass, strict=True):
        assert ours["flat"].tobytes() == theirs["flat"].tobytes()
        spared = [a < b for a, b in zip(ours["forwards"], theirs["forwards"], strict=True)]
        sends = ours["forwards"][0] > 0  # the last stage sends nothing upwards
        assert spared == ([True, codec != "powersgd", True] if sends else [False] * 3)


def test_rows_are_keyed_by_the_tick_that_trains_them(model: Path):
    """Whether their log-probs are recomputed before it or not: so the ratio of the two compares equal draws."""
    state = make_rank(model, codec=CODECS["random_k"], grpo=GrpoConfig(lr=1e-3, train_batch_size=16))
    worker = Alone(state, passes=True)
    (share,) = shares(MINIS[:2], 1, 1)
    worker.begin_step(7, share.frame)
    for tick, mini, given in zip((7, 8), worker.minis, MINIS):
        expected = microbatches(given, deal(given, 1)[0], state.setup.swarm.micro_batch_size, state.grid.device, tick)
        assert all(torch.equal(a.rows.keys, b.rows.keys) for a, b in zip(mini.micros, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", ["fixed", "entropy"])
def test_what_a_transform_makes_of_rows_in_a_tick_does_not_depend_on_a_pass_before_it(
    model: Path, codec: str, layout: tuple[int, int]
):
    """Of the first tick: from then on its rate answers to the bytes that were spent, and fewer were."""
    with_pass, without = (_run(model, codec, layout, passes, size=1, steps=1) for passes in (True, False))
    for ours, theirs in zip(without, with_pass, strict=True):
        assert ours["flat"].tobytes() == theirs["flat"].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("old", ["trainer", "tick"])
def test_a_step_tells_once_how_far_the_policy_is_and_of_all_of_its_samples(
    model: Path, old: str, layout: tuple[int, int]
):
    """With a pass it is told before the first tick, without one with it: and it is the same number."""
    with_pass, without = (
        _run(model, "powersgd", layout, passes, old if not passes else "trainer") for passes in (True, False)
    )
    for step, refreshed in ((0, False), (1, True), (2, False)):
        found = []
        for ranks in (with_pass, without):
            told = {}
            for at in range(3 * step, 3 * step + 3):
                reports = [rank["told"][at][1] for rank in ranks]
                metrics = combine(reports, 1)[0]
                if mismatch.LOGPROB_KL in metrics:
                    told[ranks[0]["told"][at][0]] = [metrics[name] for name in mismatch.NAMES]
            found.append(told)
        assert list(found[0]) == ["begin"]
        assert list(found[1]) == ["begin" if refreshed and old == "trainer" else "tick 0"]
        if not refreshed and step == 0:
            np.testing.assert_allclose(found[1]["tick 0"], found[0]["begin"], rtol=1e-6)


def test_with_one_mini_batch_a_step_ticks_own_log_probs_never_cost_a_pass_and_clip_nothing(model: Path):
    trainer, tick = (_run(model, "powersgd", (1, 1), False, old, size=1, steps=6)[0] for old in ("trainer", "tick"))
    assert [bool(sent) for sent in tick["forwards"]] == [False] * 6
    assert [bool(sent) for sent in trainer["forwards"]] == [False, True, True, False, False, True]
    clipped = [
        [report.sums["actor/pg_clipfrac"] for name, report in found["told"] if name == "tick 0"]
        for found in (trainer, tick)
    ]
    assert clipped[1] == [0.0] * 6 and min(clipped[0][i] for i in (1, 2, 5)) > 0
    assert trainer["flat"].tobytes() != tick["flat"].tobytes()
