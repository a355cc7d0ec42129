"""Every objective against loops over samples and tokens in Python floats, gradients by hand: the papers', verl's and TRL's.

verl: verl/trainer/ppo/core_algos.py (`compute_grpo_outcome_advantage`, `agg_loss`, `compute_policy_loss_vanilla`,
`compute_policy_loss_gspo`, `kl_penalty_forward`). TRL: trl/trainer/grpo_trainer.py (`_compute_loss`).
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import optimization

from rl.aggregation import out_of_loss, weighted
from rl.batch import Batch, concat
from rl.config import GrpoConfig
from rl.grpo import group_advantages, policy_loss
from rl.grpo_config import LrSchedule
from rl.objective import microbatches
from rl.shaping import KL_PENALTY, OVERLONG, SCORE, shaped

CPU = torch.device("cpu")
LONGEST = 7
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@dataclass
class Sample:
    """One answer: its reward, and log-probs of its tokens."""

    reward: float
    truncated: bool
    new: list[float]
    old: list[float]
    ref: list[float]


def drawn_samples(rng: random.Random, groups: int, each: int) -> list[Sample]:
    """Ratios inside, below and above any clip range; one group in three has one reward only."""
    found = []
    for _ in range(groups):
        alike = rng.random() < 1 / 3
        for _ in range(each):
            n = rng.randint(1, LONGEST)
            new = [-rng.randint(0, 200) / 64 for _ in range(n)]  # exact in float32, as all that follows
            old, ref = ([x + rng.randint(-40, 40) / 64 for x in new] for _ in range(2))
            reward = 1.0 if alike else float(rng.randint(0, 3))
            found.append(Sample(reward, n == LONGEST or rng.random() < 0.2, new, old, ref))
    return found


def drawn_config(rng: random.Random, mode: str, each: int) -> GrpoConfig:
    return GrpoConfig(
        group_size=each,
        max_response_length=LONGEST,
        loss_agg_mode=mode,
        importance_sampling_level=rng.choice(["token", "sequence"]),
        norm_adv_by_std=rng.random() < 0.5,
        overlong_filter=rng.random() < 0.5,
        zero_variance=rng.choice(["keep", "drop"]),
        clip_ratio=0.2,
        clip_ratio_low=rng.choice([None, 0.1]),
        clip_ratio_high=rng.choice([None, 0.28, 1.5]),
        clip_ratio_c=rng.choice([None, 1.6]),
        kl_loss_coef=rng.choice([0.0, 0.3, 0.3]),
        kl_loss_type=rng.choice(["k1", "k2", "k3"]),
    )


# --- the reference -----------------------------------------------------------------------------


def slow_advantages(rewards: list[float], each: int, by_std: bool) -> list[float]:
    found = []
    for start in range(0, len(rewards), each):
        group = rewards[start : start + each]
        mean, std = statistics.fmean(group), statistics.stdev(group)
        found += [(r - mean) / (std + 1e-6) if by_std else r - mean for r in group]
    return found


def slow_policy(sample: Sample, advantage: float, c: GrpoConfig) -> tuple[list[float], list[float]]:
    """Loss of each token, and the gradient of their *mean times their number* by each token's log-prob."""
    logs = [n - o for n, o in zip(sample.new, sample.old)]
    if c.importance_sampling_level == "sequence":  # TRL: one (B, 1) weight; its gradient reaches all tokens alike
        logs = [sum(logs) / len(logs)] * len(logs)
    low = c.clip_ratio if c.clip_ratio_low is None else c.clip_ratio_low
    high = c.clip_ratio if c.clip_ratio_high is None else c.clip_ratio_high
    losses, grads = [], []
    for log in logs:
        ratio = math.exp(log)
        bounded = min(max(ratio, 1 - low), 1 + high)
        loss, grad = -ratio * advantage, -ratio * advantage
        if -bounded * advantage > loss:
            loss, grad = -bounded * advantage, 0.0
        if c.clip_ratio_c is not None and advantage < 0 and loss > -advantage * c.clip_ratio_c:
            loss, grad = -advantage * c.clip_ratio_c, 0.0
        losses.append(loss)
        grads.append(grad)
    return losses, grads


def slow_kl(kind: str, new: float, ref: float) -> tuple[float, float]:
    x = new - ref
    return {
        "k1": (x, 1.0),
        "k2": (x * x / 2, x),
        "k3": (math.exp(-x) + x - 1, 1 - math.exp(-x)),
    }[kind]


def slow_loss(samples: list[Sample], c: GrpoConfig) -> tuple[float, float, list[list[float]]]:
    """The loss, the policy's part of it, and the gradient by the log-prob of each token of each sample."""
    advantages = slow_advantages([s.reward for s in samples], c.group_size, c.norm_adv_by_std)
    kept = []
    for i, sample in enumerate(samples):
        group = samples[i // c.group_size * c.group_size :][: c.group_size]
        alike = c.zero_variance == "drop" and len({s.reward for s in group}) == 1
        kept.append(not (alike or (c.overlong_filter and sample.truncated)))
    count, tokens = sum(kept), sum(len(s.new) for s, k in zip(samples, kept) if k)
    policy = total = 0.0
    grads = []
    for sample, advantage, keep in zip(samples, advantages, kept):
        if not keep:
            grads.append([0.0] * len(sample.new))
            continue
        over = {
            "token-mean": tokens,
            "seq-mean-token-mean": count * len(sample.new),
            "seq-mean-token-sum": count,
            "seq-mean-token-sum-norm": count * c.max_response_length,  # TRL's dr_grpo: (B * max_completion_length)
        }[c.loss_agg_mode]
        losses, own = slow_policy(sample, advantage, c)
        kls = [slow_kl(c.kl_loss_type, n, r) for n, r in zip(sample.new, sample.ref)]
        policy += sum(losses) / over
        total += (sum(losses) + c.kl_loss_coef * sum(kl for kl, _ in kls)) / over
        grads.append([(g + c.kl_loss_coef * slope) / over for g, (_, slope) in zip(own, kls)])
    return total, policy, grads


# --- ours --------------------------------------------------------------------------------------


def batch_of(samples: list[Sample], c: GrpoConfig) -> Batch:
    lengths = np.array([len(s.new) for s in samples], np.int32)
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    return Batch(
        tokens=np.ones(int((lengths + 1).sum()), np.int32),
        prompt=np.ones(len(samples), np.int32),
        total=lengths + 1,
        rollout_logprobs=np.zeros(lengths.sum(), np.float32),
        ref_logprobs=np.zeros(0, np.float32),
        rewards=rewards.float().numpy(),
        advantages=group_advantages(rewards, c.group_size, c.norm_adv_by_std).numpy(),
        truncated=np.array([s.truncated for s in samples]),
    )


Our = tuple[list[float], list[float], list[float]]


def our_losses(batches: list[list[Sample]], c: GrpoConfig, order: list[int], size: int) -> Our:
    """Of each batch the loss and the policy's part, and the gradient by each token's log-prob of them all.

    The gradient in microbatches of `size` samples of any batch, each divided as its own is: as the anchor has them.
    """
    minis = [weighted(batch_of(samples, c), c) for samples in batches]
    flat = [s for samples in batches for s in samples]
    whole = replace(concat(minis), rollout_logprobs=np.arange(sum(len(s.new) for s in flat), dtype=np.float32))
    new, old, ref = (torch.tensor([x for s in flat for x in getattr(s, k)]).double() for k in ("new", "old", "ref"))
    new.requires_grad_()
    over = torch.tensor([float(mini.loss_tokens) for mini in minis for _ in range(mini.response_tokens)])
    for micro in microbatches(whole, np.array(order), size, CPU):
        at = micro.rollout_logprobs.long()
        given = over[at], c, None, ref[at], None, micro.loss_weights, micro.samples
        policy_loss(new[at], old[at], micro.advantages.double(), *given).loss.backward()
    losses, policy, start = [], [], 0
    for mini in minis:
        at = slice(start, start := start + mini.response_tokens)
        advantages, weights, which = (
            torch.from_numpy(np.repeat(values, mini.response_lengths)) if len(values) else None
            for values in (mini.advantages, mini.loss_weights, np.arange(len(mini)))
        )
        known = mini.loss_tokens, c, None, ref[at], None, weights, which
        terms = policy_loss(new[at].detach(), old[at], advantages.double(), *known)
        losses.append(terms.loss.item())
        policy.append(terms.sums["actor/pg_loss"].item() / mini.loss_tokens)
    return losses, policy, new.grad.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_objectives_are_those_of_their_references_on_200_random_batches_with_gradients(mode: str):
    seen: Counter[str] = Counter()
    for seed in range(10):
        rng = random.Random(f"{mode} {seed}")
        each = rng.randint(2, 4)
        c = drawn_config(rng, mode, each)
        batches = [drawn_samples(rng, rng.randint(1, 3), each) for _ in range(20)]
        count = sum(map(len, batches))
        losses, policy, grads = our_losses(batches, c, rng.sample(range(count), count), rng.randint(20, count))
        expected = [slow_loss(samples, c) for samples in batches]
        np.testing.assert_allclose(losses, [e[0] for e in expected], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(policy, [e[1] for e in expected], rtol=1e-6, atol=1e-6)
        scales = [max(abs(g) for own in e[2] for g in own) for e in expected for own in e[2] for _ in own]
        errors = np.abs(np.subtract(grads, [g for e in expected for own in e[2] for g in own]))
        assert (errors <= 1e-6 * np.array(scales)).all()
        seen.update([c.importance_sampling_level, c.kl_loss_type, c.zero_variance, f"filter {c.overlong_filter}"])
    assert min(seen[k] for k in ("token", "sequence", "k1", "k2", "k3", "keep", "drop", "filter True")) > 0


def test_a_mini_batch_of_which_nothing_is_in_the_loss_has_a_loss_of_0_and_no_gradient():
    samples = [replace(s, truncated=True) for s in drawn_samples(random.Random(0), 2, 3)]
    for mode in MODES:
        c = GrpoConfig(group_size=3, max_response_length=LONGEST, loss_agg_mode=mode, overlong_filter=True)
        losses, policy, grads = our_losses([samples], c, list(range(6)), 2)
        assert losses == policy == [0] and not any(grads)


def test_what_is_cut_stays_in_its_groups_mean():
    """As with TRL's `mask_truncated_completions`: masks are set after the advantages are there."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    c = GrpoConfig(group_size=4, max_response_length=LONGEST, overlong_filter=True)
    samples = [
        replace(s, reward=r, truncated=i == 1)
        for i, (s, r) in enumerate(zip(drawn_samples(random.Random(1), 1, 4), rewards.tolist()))
    ]
    mini = weighted(batch_of(samples, c), c)
    assert mini.advantages.tolist() == group_advantages(rewards, 4).tolist()
    assert mini.loss_weights.tolist() == [1, 0, 1, 1]
    assert mini.loss_tokens == sum(len(s.new) for s in samples) - len(samples[1].new)


def test_a_group_is_left_out_where_all_are_the_same_and_not_where_one_is_average():
    c = GrpoConfig(group_size=3, max_response_length=LONGEST, zero_variance="drop")
    rewards = [0.0, 0.5, 1.0, 0.1, 0.1, 0.1]
    samples = [replace(s, reward=r) for s, r in zip(drawn_samples(random.Random(2), 2, 3), rewards)]
    batch = batch_of(samples, c)
    assert batch.advantages[1] == 0 and out_of_loss(batch, c).tolist() == [False] * 3 + [True] * 3


def test_by_default_samples_have_no_weights_and_nothing_is_sent_for_them():
    c = GrpoConfig(group_size=2, max_response_length=LONGEST)
    batch = batch_of(drawn_samples(random.Random(3), 2, 2), c)
    assert weighted(batch, c) is batch and batch.loss_tokens == batch.response_tokens
    sent = weighted(batch, c.model_copy(update={"loss_agg_mode": "seq-mean-token-mean"}))
    found = Batch.from_frame(sent.to_frame(), "us")[1]
    assert found.loss_weights.tolist() == sent.loss_weights.tolist() and found.loss_tokens == sent.loss_tokens


def test_metrics_of_ratios_are_means_over_the_tokens_that_are_trained_in_every_mode():
    samples = [replace(s, truncated=i == 2) for i, s in enumerate(drawn_samples(random.Random(4), 1, 4))]
    kept = [s for i, s in enumerate(samples) if i != 2]
    kl = [o - n for s in kept for n, o in zip(s.new, s.old)]
    for mode in MODES:
        c = GrpoConfig(group_size=4, max_response_length=LONGEST, overlong_filter=True, loss_agg_mode=mode)
        mini = weighted(batch_of(samples, c), c)
        (micro,) = microbatches(mini, np.arange(4), 4, CPU)
        new, old = (torch.tensor([x for s in samples for x in getattr(s, k)]).double() for k in ("new", "old"))
        given = {"weights": micro.loss_weights, "samples": micro.samples, "entropy": torch.ones_like(new)}
        terms = policy_loss(new, old, micro.advantages, mini.loss_tokens, c, **given)
        found = {name: value.item() / mini.loss_tokens for name, value in terms.sums.items()}
        assert found["actor/ppo_kl"] == pytest.approx(statistics.fmean(kl), rel=1e-5)
        assert found["actor/entropy"] == 1


# --- rewards -----------------------------------------------------------------------------------


def test_long_answers_lose_what_verls_overlong_buffer_takes():
    """verl/workers/reward_manager/dapo.py, line by line."""
    c = GrpoConfig(max_response_length=40, overlong_buffer={"length": 15, "penalty": 0.7})
    lengths, scores = list(range(1, 41)), [float(n % 2) for n in range(40)]
    expected = []
    for n, score in zip(lengths, scores):
        expected_len = 40 - 15
        exceed_len = n - expected_len
        expected.append(score + min(-exceed_len / 15 * 0.7, 0))
    rewards, sums = shaped(scores, np.array(lengths), c, [], [])
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-12)
    assert sums[SCORE] == sum(scores) and sums[OVERLONG] == pytest.approx(sum(scores) - sum(expected))
    assert rewards[24] == scores[24] and rewards[39] == pytest.approx(scores[39] - 0.7)


def test_the_kl_in_the_reward_is_that_of_verl():
    """`apply_kl_penalty` in verl/trainer/ppo/ray_trainer.py, and the sum over tokens of outcome advantages."""
    samples, c = drawn_samples(random.Random(5), 2, 3), GrpoConfig(kl_in_reward=0.01)
    expected, kls = [], []
    for s in samples:
        kld = [n - r for n, r in zip(s.new, s.ref)]
        expected.append(s.reward - sum(0.01 * k for k in kld))
        kls.append(statistics.fmean(kld))
    new, ref = ([np.array(getattr(s, k), np.float32) for s in samples] for k in ("new", "ref"))
    rewards, sums = shaped([s.reward for s in samples], np.array([len(s.new) for s in samples]), c, new, ref)
    np.testing.assert_allclose(rewards, expected, atol=1e-7)
    assert sums[KL_PENALTY] / len(samples) == pytest.approx(statistics.fmean(kls), abs=1e-6)


def test_rewards_stay_the_scores_where_nothing_is_taken_off():
    scores = [0.1, 0.2]
    assert shaped(scores, np.array([3, 4]), GrpoConfig(), [], []) == (scores, {})


# --- learning rates ----------------------------------------------------------------------------


def schedule_of_transformers(kind: str, optimizer: torch.optim.Optimizer, warmup: int, ticks: int, ratio: float):
    if kind == "constant":
        return optimization.get_constant_schedule_with_warmup(optimizer, warmup)
    if kind == "linear":
        return optimization.get_linear_schedule_with_warmup(optimizer, warmup, ticks)
    return optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, ticks, min_lr_rate=ratio)


@pytest.mark.parametrize("warmup", [0, 1, 7, 30])
@pytest.mark.parametrize(("kind", "ratio"), [("constant", 0.0), ("linear", 0.0), ("cosine", 0.0), ("cosine", 0.1)])
def test_learning_rates_are_those_of_transformers(kind: str, ratio: float, warmup: int):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-5)
    theirs = schedule_of_transformers(kind, optimizer, warmup, 30, ratio)
    ours = LrSchedule(kind=kind, warmup_ticks=warmup, min_ratio=ratio)
    for tick in range(1, 31):
        assert 3e-5 * ours.factor(tick, 30) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        theirs.step()


def test_a_linear_rate_ends_at_its_share_as_a_cosine_does():
    for kind in ("linear", "cosine"):
        ours = LrSchedule(kind=kind, warmup_ticks=4, min_ratio=0.25)
        assert [ours.factor(5, 20), ours.factor(21, 20), ours.factor(13, 20)] == pytest.approx([1, 0.25, 0.625])


def test_a_constant_rate_is_the_rate_to_the_bit():
    for lr in (6e-5, 1e-6, 0.1, 1 / 3):
        assert lr * LrSchedule().factor(17, 100) == lr
