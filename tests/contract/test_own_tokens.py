"""Tokens of an environment are read and not learned: the gradient is that of the policy's own tokens alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.dense_gradient import DenseGradient
from anchor_service.replay import unpack_replay
from rl.aggregation import weighted
from rl.batch import Batch
from rl.config import GrpoConfig, SnapshotConfig
from rl.objective import loss_terms, microbatches
from rl.policy import Stage
from rl.spans import spans
from tests.conftest import make_batch, with_environment

CPU = torch.device("cpu")
(SPAN,) = spans(4, [], 1)
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def conversations() -> Batch:
    batch = make_batch(6)
    base = np.random.default_rng(1).normal(-3.5, 0.5, batch.response_tokens).astype(np.float32)
    return with_environment(replace(batch, ref_logprobs=base))


def gradient(stage: Stage, batch: Batch, grpo: GrpoConfig, share: bool = False) -> torch.Tensor:
    stage.weights.grad.zero_()
    for micro in microbatches(batch, np.arange(len(batch)), 4, CPU, share=share):
        hidden = stage(micro.ids, micro.real, {}, micro.distinct)
        loss_terms(stage, hidden, micro, micro.rollout_logprobs, batch.loss_tokens, grpo, 1.3).loss.backward()
    return stage.weights.grad.clone()


def one_by_one(stage: Stage, batch: Batch, grpo: GrpoConfig) -> torch.Tensor:
    """Each sample alone, token by token; clipped ratio, KL (k3), entropy, means by `loss_agg_mode`."""
    stage.weights.grad.zero_()
    losses, lengths, t, r, known = [], [], 0, 0, 0
    for i in range(len(batch)):
        p, n = int(batch.prompt[i]), int(batch.total[i])
        ids = torch.from_numpy(batch.tokens[t : t + n].astype(np.int64))[None]
        logits = stage.logits(stage(ids, torch.ones_like(ids, dtype=torch.bool), {})[0])
        found = []
        for at in range(p, n):
            if not batch.own[r + at - p]:
                continue
            logp = torch.log_softmax(logits[at - 1] / 1.3, -1)
            new, a = logp[ids[0, at]], float(batch.advantages[i])
            ratio = (new - float(batch.rollout_logprobs[known])).exp()
            far = float(batch.ref_logprobs[known]) - new
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - grpo.clip_ratio, 1 + grpo.clip_ratio))
            loss = loss + grpo.kl_loss_coef * (far.exp() - far - 1)
            found.append(loss + grpo.entropy_coeff * (logp.exp() * logp).sum())
            known += 1
        losses.append(torch.stack(found).sum())
        lengths.append(len(found))
        t, r = t + n, r + n - p
    means = {
        "token-mean": lambda: torch.stack(losses).sum() / sum(lengths),
        "seq-mean-token-mean": lambda: torch.stack([x / n for x, n in zip(losses, lengths)]).mean(),
        "seq-mean-token-sum": lambda: torch.stack(losses).mean(),
    }
    means[grpo.loss_agg_mode]().backward()
    return stage.weights.grad.clone()


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_a_loop_over_the_policys_own_tokens_in_workers_and_anchor(
    untied_model: Path, mode: str
):
    grpo = GrpoConfig(loss_agg_mode=mode, kl_loss_coef=0.1, entropy_coeff=0.01)
    stage, batch = Stage(untied_model, SPAN, torch.float32, CPU), weighted(conversations(), grpo)
    expected = one_by_one(stage, batch, grpo)
    for share in (False, True):
        torch.testing.assert_close(gradient(stage, batch, grpo, share), expected, rtol=1e-4, atol=1e-6)
    anchor = DenseGradient(untied_model, [SPAN], torch.float32, CPU, 5, grpo, 1.3, SnapshotConfig(encoding="full"))
    m = anchor.gradient(*unpack_replay(batch.to_frame(denominator=batch.loss_tokens), "a replay"))
    torch.testing.assert_close(m, expected, rtol=1e-4, atol=1e-6)


def test_nothing_comes_back_from_where_an_environment_speaks(untied_model: Path):
    stage, batch = Stage(untied_model, SPAN, torch.float32, CPU), conversations()
    (micro,) = microbatches(batch, np.arange(len(batch)), 99, CPU)
    hidden = stage(micro.ids, micro.real, {})
    hidden.retain_grad()
    grpo = GrpoConfig(entropy_coeff=0.1)
    loss_terms(stage, hidden, micro, micro.rollout_logprobs, batch.loss_tokens, grpo, 1.0).loss.backward()
    came = torch.zeros_like(micro.real)
    came[micro.predicts] = True
    assert hidden.grad is not None and 0 < (~came & micro.real).sum()
    assert (hidden.grad[~came] == 0).all() and (hidden.grad[came].abs().sum(-1) > 0).all()


def test_what_an_environment_says_last_changes_no_bit_of_the_gradient(untied_model: Path):
    batch = make_batch(6)
    ends, own = np.cumsum(batch.response_lengths), np.ones(batch.response_tokens, bool)
    own[ends - 1] = False
    batch = replace(batch, own=own, rollout_logprobs=batch.rollout_logprobs[own])
    tokens = batch.tokens.copy()
    tokens[np.cumsum(batch.total) - 1] = 1  # no other token is 1
    stage = Stage(untied_model, SPAN, torch.float32, CPU)
    first = gradient(stage, batch, GrpoConfig())
    assert first.abs().max() > 0
    assert torch.equal(first, gradient(stage, replace(batch, tokens=tokens), GrpoConfig()))


def test_marks_that_name_all_tokens_the_policys_own_change_no_bit(untied_model: Path):
    stage, batch = Stage(untied_model, SPAN, torch.float32, CPU), make_batch(6)
    marked = replace(batch, own=np.ones(batch.response_tokens, bool))
    assert torch.equal(gradient(stage, batch, GrpoConfig()), gradient(stage, marked, GrpoConfig()))
