"""What a swarm measures of its own policy: the same on any layout, and with old log-probs of either kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl import mismatch
from rl.config import GrpoConfig
from swarm.messages import TickPlan
from swarm.telemetry import combine
from swarm.tick import tick
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import make_rank, mini_batch

BATCH = make_batch()


def _first_tick(rank: int, init: str, options: dict, old: str, index: int) -> dict:
    state = make_rank(rank=rank, init=init, grpo=GrpoConfig(lr=1e-3, old_logprobs=old), **options)
    return tick(state, TickPlan(1, index, None, 0), mini_batch(state, BATCH), lambda c: c)


def _measured(folder: Path, dp: int, pp: int, old: str = "rollout", index: int = 0) -> dict[str, float]:
    reports = on_ranks(dp * pp, _first_tick, dict(folder=folder, dp=dp, pp=pp), old, index)
    metrics, _ = combine(reports, BATCH.response_tokens)
    return {name: value for name, value in metrics.items() if name in mismatch.NAMES}


def test_the_training_forward_measures_what_a_forward_before_it_does(untied_model: Path):
    state = make_rank(untied_model)
    mini = mini_batch(state, BATCH, trainer_logprobs=True)
    sums: dict[str, float] = {}
    for trainer, micro in zip(mini.old_logprobs, mini.micros):
        for name, value in mismatch.sums(micro.rollout_logprobs, trainer).items():
            sums[name] = sums.get(name, 0.0) + value.item()
    expected = mismatch.metrics(sums)
    assert expected["codec/logprob_kl"] != 0 and expected["codec/ratio_outside_1.2"] > 0
    assert _measured(untied_model, 1, 1) == pytest.approx(expected, rel=1e-4)


def test_it_does_not_depend_on_the_layout(model: Path):
    reference = _measured(model, 1, 1)
    assert set(reference) == set(mismatch.NAMES)
    for dp, pp in ((2, 1), (1, 2), (2, 2)):
        found = _measured(model, dp, pp)
        np.testing.assert_allclose([found[n] for n in mismatch.NAMES], list(reference.values()), rtol=1e-4)


@pytest.mark.parametrize(("old", "index"), [("rollout", 1), ("trainer", 0)])
def test_a_later_mini_batch_or_recomputed_log_probs_measure_nothing_in_the_tick(
    untied_model: Path, old: str, index: int
):
    assert _measured(untied_model, 1, 1, old, index) == {}
