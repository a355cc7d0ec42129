"""Ranks that receive corrections at different times merge the same version in the same tick."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import torch

from anchor_service.messages import Correction
from merger.config import MergerConfig
from swarm.messages import TickPlan
from tests.conftest import on_ranks
from tests.contract.harness import make_rank

TICKS = 1000


def _merged_versions(rank: int, init: str, folder: Path) -> tuple[list[int], list[int]]:
    """Versions merged, tick by tick, while a thread delivers them after random delays of this rank's own."""
    state = make_rank(folder, rank, dp=2, pp=2, init=init, merger=MergerConfig(kind="signed_ema"))
    n = state.stage.weights.numel
    rng, done = random.Random(rank), threading.Event()

    def deliver() -> None:
        version = 0
        while not done.is_set():
            version += 1
            state.held.inbox.put(Correction(version, 0, None, torch.ones(n, dtype=torch.int8), ""))
            time.sleep(rng.expovariate(200))

    thread = threading.Thread(target=deliver)
    thread.start()
    versions, ages = [], []
    for t in range(1, TICKS + 1):
        state.stage.weights.grad.fill_(float(t))
        state.held.agree(TickPlan(t, 0, None, None))
        outcome = state.held.merge(TickPlan(t, 0, None, None), state.stage.weights.grad, state.norm)
        versions.append(outcome.version or 0)
        ages.append(outcome.age if outcome.merged else -1)
    done.set()
    thread.join()
    state.grid.min_world(0, 0)  # leave together
    return versions, ages


def test_all_ranks_merge_the_same_version_in_the_same_tick_over_1000_ticks(untied_model: Path):
    found = on_ranks(4, _merged_versions, untied_model)
    versions, ages = found[0]
    assert all(other == found[0] for other in found)
    assert versions == sorted(versions) and len(set(versions)) > 20
    for before, after, age in zip(versions, versions[1:], ages[1:]):
        assert (age == 0) == (after != before)


def test_a_rank_that_takes_what_it_holds_itself_would_be_caught(untied_model: Path):
    """The agreement is broken on purpose: one rank ignores the others, and the replicas' digests tell."""
    from anchor_service.errors import ReplicaMismatch
    from swarm.tick import tick
    from tests.conftest import make_batch
    from tests.contract.harness import mini_batch

    def work(rank: int, init: str) -> str:
        state = make_rank(untied_model, rank, dp=2, init=init, merger=MergerConfig(kind="signed_ema"))
        signs = torch.ones(state.stage.weights.numel, dtype=torch.int8)
        state.held.inbox.put(Correction(1, 0, None, signs, ""))
        if rank == 1:
            state.held.inbox.put(Correction(2, 0, None, -signs, ""))
            agree = state.grid.min_world
            state.grid.min_world = lambda fine, mine: (agree(fine, mine)[0], mine)
        try:
            tick(state, TickPlan(1, 0, None, None), mini_batch(state, make_batch()), lambda c: c)
        except ReplicaMismatch as error:
            return str(error)
        return "not caught"

    for report in on_ranks(2, work):
        assert "replicas of stage 0 differ" in report and "worker d1p0 holds" in report
