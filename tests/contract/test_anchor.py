"""The anchor's share of a batch, and what ranks do with corrections that are too late or too old."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.config import AnchorConfig
from anchor_service.dense_gradient import DenseGradient
from anchor_service.messages import Correction
from anchor_service.replay import pack_replay, unpack_replay
from merger.config import MergerConfig
from rl.config import GrpoConfig, SnapshotConfig
from rl.spans import spans
from swarm.messages import MergeOutcome, TickPlan
from tests.conftest import make_batch
from tests.contract.harness import make_rank


def test_a_share_of_the_replay_is_unbiased(untied_model: Path):
    """The mean over all halves of a batch, with half its denominator, is M of the whole batch."""
    anchor = DenseGradient(
        untied_model, spans(4, [2], 1), torch.float32, torch.device("cpu"), 4, GrpoConfig(), 1.0, SnapshotConfig()
    )
    batch = make_batch(samples=6)
    whole = anchor.gradient(batch, batch.response_tokens).clone()
    halves = [
        anchor.gradient(batch.pick(np.array(chosen)), batch.response_tokens / 2).clone()
        for chosen in combinations(range(6), 3)
    ]
    torch.testing.assert_close(torch.stack(halves).mean(0), whole, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(halves[0], whole, rtol=0.1)


def _run(
    folder: Path, anchor: AnchorConfig, arrivals: dict[int, tuple[int, int]], ticks: int
) -> list[tuple[MergeOutcome, float]]:
    """Outcomes and gradients of `ticks` ticks; `arrivals[t]` is (version, source tick) that is held from tick t on."""
    state = make_rank(folder, anchor=anchor, merger=MergerConfig(kind="signed_ema"))
    n = state.stage.weights.numel
    found = []
    for t in range(1, ticks + 1):
        if t in arrivals:
            state.held.inbox.put(Correction(*arrivals[t], None, torch.full((n,), -1, dtype=torch.int8), ""))
        state.stage.weights.grad.fill_(1.0)
        state.held.agree(TickPlan(t, 0, None, None))
        outcome = state.held.merge(TickPlan(t, 0, None, None), state.stage.weights.grad, state.norm)
        found.append((outcome, state.stage.weights.grad[0].item()))
    return found


def test_a_correction_later_than_max_lag_is_refused_and_the_held_one_goes_on(untied_model: Path):
    found = _run(untied_model, AnchorConfig(max_lag=4), {2: (1, 0), 6: (2, 1), 8: (3, 6)}, 9)
    assert [o.version or 0 for o, _ in found] == [0, 1, 1, 1, 1, 1, 1, 3, 3]
    assert [(t, o.refused) for t, (o, _) in enumerate(found, 1) if o.refused] == [(6, 2)]


def test_a_correction_held_longer_than_max_age_is_dropped_until_a_fresh_one_comes(untied_model: Path):
    found = _run(untied_model, AnchorConfig(max_age=2), {1: (1, 0), 7: (2, 5)}, 8)
    merged = [g != 1.0 for _, g in found]
    assert merged == [True, True, True, False, False, False, True, True]
    assert [o.expired for o, _ in found] == [not o.merged for o, _ in found] == [not m for m in merged]
    assert found[0][1] == -0.5  # alpha 0.25: the sign is reversed, half the size is left


def test_of_a_head_the_rest_is_fetched_only_when_the_merger_gives_it_a_share(untied_model: Path):
    """Fires start in ticks 2, 4 and 6, each merged in the next. The second M agrees with the first, the third with neither; each
    does with the gradient of its tick."""
    state = make_rank(untied_model, merger=MergerConfig(kind="calibrated", prior=0.0))
    generator, n = torch.Generator().manual_seed(0), state.stage.weights.numel
    bars = [torch.randn(n, generator=generator).sign().char() for _ in range(3)]
    m = torch.randn(n, generator=generator).sign().char()
    looks, fetched = [m, m, -m], []

    def fetch(version: int) -> Correction:
        fetched.append(version)
        return Correction(version, 2 * version - 1, None, bars[version - 1], "")

    for t in range(1, 9):
        if t in (3, 5, 7):
            v = t // 2
            head = Correction(v, t - 2, None, None, "", looks[v - 1], partial(fetch, v))
            state.held.inbox.put(head)
        g = torch.randn(n, generator=generator)
        if t in (2, 4, 6):
            g = g.abs() * looks[t // 2 - 1]
        merged = g.clone()
        plan = TickPlan(t, 0, None, None, keep_source=t in (2, 4, 6))
        state.held.agree(plan)
        outcome = state.held.merge(plan, merged, state.norm)
        assert outcome.whole == (outcome.dose > 0) == (t in (5, 6)) and fetched == [2] * (t >= 5)
        expected = g + outcome.dose * (g.abs() * bars[1] - g) if outcome.whole else g
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-7)
        assert outcome.whole or torch.equal(merged.view(torch.int32), g.view(torch.int32))
        if t > 2:
            held = bars[1] if outcome.whole else looks[(t - 1) // 2 - 1]
            assert outcome.merged and outcome.sign_agreement == pytest.approx((held == g.sign()).double().mean().item())


def test_m_of_several_mini_batches_is_the_mean_of_theirs(untied_model: Path):
    """Samples of all, each over n times its own mini-batch's response tokens; with KL and entropy in the objective too."""
    for grpo in (GrpoConfig(), GrpoConfig(kl_loss_coef=0.1, entropy_coeff=0.01)):
        anchor = DenseGradient(
            untied_model, spans(4, [2], 1), torch.float32, torch.device("cpu"), 4, grpo, 1.0, SnapshotConfig()
        )
        minis = [replace(b, ref_logprobs=b.rollout_logprobs) for b in (make_batch(n, seed=n) for n in (6, 3, 5))]
        each = torch.stack([anchor.gradient(b, b.response_tokens).clone() for b in minis])
        frame = pack_replay([(b, len(minis) * b.response_tokens) for b in minis])
        found = anchor.gradient(*unpack_replay(frame, "the replay of tick 3"))
        torch.testing.assert_close(found, each.mean(0), rtol=1e-4, atol=1e-6)
