"""GRPO's advantages and loss against naive loops over samples and tokens in Python floats."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import GrpoConfig
from rl.engine import PlainModel
from rl.grpo import group_advantages, kl_estimate, policy_loss, token_logprobs
from rl.objective import logprobs
from rl.transformers_engine import _draw

LAW = settings(deadline=None, derandomize=True, max_examples=100)
CONFIG = GrpoConfig(clip_ratio=0.2)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(n: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New and old log-probs, advantages: both signs, ratios inside, below and above the clip range."""
    return -1 - rand(n).abs(), -1 - rand(n).abs() + 0.3 * rand(n, seed=1), rand(n, seed=2)


# --- advantages --------------------------------------------------------------------------------


def slow_advantages(rewards: list[float], n: int) -> list[float]:
    found = []
    for start in range(0, len(rewards), n):
        group = rewards[start : start + n]
        mean, std = statistics.fmean(group), statistics.stdev(group)  # stdev: divides by n - 1
        found += [(r - mean) / (std + 1e-6) for r in group]
    return found


@LAW
@given(st.integers(2, 9), st.integers(1, 5), st.data())
def test_advantages_are_the_standardised_rewards_of_each_group_alone(n: int, groups: int, data: st.DataObject):
    reward = st.sampled_from([0.0, 1.0]) | st.floats(-10, 10, width=32)
    rewards = data.draw(st.lists(reward, min_size=n * groups, max_size=n * groups))
    found = group_advantages(torch.tensor(rewards, dtype=torch.float32), n)
    torch.testing.assert_close(found, torch.tensor(slow_advantages(rewards, n)), rtol=1e-4, atol=1e-5)


def test_the_standard_deviation_is_the_unbiased_one():
    """Of 0 and 1 it is sqrt(1/2), not 1/2."""
    torch.testing.assert_close(group_advantages(torch.tensor([0.0, 1.0]), 2), torch.tensor([-1.0, 1.0]) / 2**0.5)


@LAW
@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 64))
def test_a_group_of_equal_rewards_has_no_advantage_at_all(reward: float, n: int):
    assert not group_advantages(torch.full((n,), reward), n).any()


def test_a_group_of_equal_rewards_takes_nothing_from_the_group_beside_it():
    found = group_advantages(torch.tensor([1.0, 1, 1, 0, 0, 1]), 3)
    assert found[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(found[3:], torch.tensor(slow_advantages([0, 0, 1], 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("count", "n"), [(7, 2), (8, 3), (4, 1), (4, 0), (4, 8), (4, -2)])
def test_rewards_that_do_not_divide_in_groups_of_two_or_more_are_refused(count: int, n: int):
    with pytest.raises(ValueError, match=f"{count} rewards do not divide in groups of {n}"):
        group_advantages(torch.ones(count), n)


# --- log-probs ---------------------------------------------------------------------------------


def test_log_probs_and_entropy_are_those_of_the_softmax():
    logits, targets = rand(5, 7) * 3, torch.tensor([0, 6, 3, 3, 1])
    logp, entropy = token_logprobs(logits, targets, 1.0, with_entropy=True)
    for i in range(5):
        weights = [math.exp(v) for v in logits[i].tolist()]
        p = [w / sum(weights) for w in weights]
        assert logp[i].item() == pytest.approx(math.log(p[targets[i]]), rel=1e-5)
        assert entropy[i].item() == pytest.approx(-sum(v * math.log(v) for v in p), rel=1e-5)
    assert token_logprobs(logits, targets, 1.0, with_entropy=False)[1] is None


def test_log_probs_of_half_precision_logits_are_computed_in_float32():
    logits = (rand(5, 7) * 3).bfloat16()
    logp, _ = token_logprobs(logits, torch.tensor([0, 6, 3, 3, 1]), 1.0, with_entropy=False)
    exact = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor([[0], [6], [3], [3], [1]])).squeeze(1)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_trainer_reference_and_sampler_divide_bf16_logits_by_the_temperature_in_float32(temperature: float):
    logits = (rand(6, 50) * 8).bfloat16()
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(5))
    targets, sampler = _draw(logits, uniform, temperature)
    exact = torch.log_softmax(logits.double() / temperature, -1).gather(1, targets[:, None]).squeeze(1)
    stage = SimpleNamespace(logits=lambda hidden: hidden)
    micro = SimpleNamespace(predicts=(torch.arange(6),), predicted=None, targets=targets)
    trainer, _ = logprobs(stage, logits, micro, temperature)
    last = torch.zeros(1, 50, dtype=torch.bfloat16)  # predicts what would follow the answer
    known = torch.cat([logits, last])[None]
    model = lambda input_ids, logits_to_keep: SimpleNamespace(logits=known[:, -logits_to_keep:])  # noqa: E731
    plain = SimpleNamespace(device=torch.device("cpu"), model=model)
    (reference,) = PlainModel.score(plain, [[0]], [targets.numpy()], temperature)
    for found in (trainer, torch.from_numpy(reference), sampler):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)


# --- the loss ----------------------------------------------------------------------------------


def slow_loss(new, old, advantages, denominator: float, clip: float = 0.2) -> float:
    """Of PPO's paper: the mean of min(ratio·A, clip(ratio)·A), negated."""
    terms = []
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist()):
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        terms.append(min(ratio * a, bounded * a))
    return -math.fsum(terms) / denominator


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.9])
def test_the_loss_is_the_clipped_surrogate_token_by_token(clip: float):
    new, old, advantages = tokens()
    terms = policy_loss(new, old, advantages, 60.0, GrpoConfig(clip_ratio=clip))
    assert terms.loss.item() == pytest.approx(slow_loss(new, old, advantages, 60.0, clip), rel=1e-12)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize(
    "ratio", [0.1, 0.8 - 1e-9, 0.8, 0.8 + 1e-9, 1.0, 1.2 - 1e-9, 1.2, 1.2 + 1e-9, 3.0], ids="{:.9f}".format
)
def test_the_clip_stops_the_gradient_only_where_the_policy_already_went_too_far(advantage: float, ratio: float):
    """dL/d logp = -A·ratio, but 0 above 1+c for A > 0 and below 1-c for A < 0."""
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, a = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    terms = policy_loss(new, old, a, 2.0, CONFIG)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(slow_loss(new, old, a, 2.0), rel=1e-12)
    r = new.exp().item()
    stopped = r > 1.2 if advantage > 0 else r < 0.8
    assert new.grad.item() == pytest.approx(0.0 if stopped else -advantage * r / 2, rel=1e-12)
    assert terms.sums["actor/pg_clipfrac"].item() == stopped


def test_the_gradient_is_that_of_finite_differences():
    new, old, advantages = tokens()
    entropy, ref = rand(60, seed=4).abs(), new + 0.5 * rand(60, seed=3)
    config = GrpoConfig(entropy_coeff=0.1, kl_loss_coef=0.3)
    leaf, e = new.clone().requires_grad_(), entropy.clone().requires_grad_()
    policy_loss(leaf, old, advantages, 60.0, config, e, ref).loss.backward()

    def at(i: int, step: float, which: int) -> float:
        moved = [new.clone(), entropy.clone()]
        moved[which][i] += step
        return policy_loss(moved[0], old, advantages, 60.0, config, moved[1], ref).loss.item()

    for i in range(60):
        for which, grad in enumerate((leaf.grad, e.grad)):
            slope = (at(i, 1e-6, which) - at(i, -1e-6, which)) / 2e-6
            assert grad[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_its_gradient_that_of_reinforce():
    new, _, advantages = tokens()
    leaf = new.clone().requires_grad_()
    terms = policy_loss(leaf, new, advantages, 60.0, CONFIG)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(-advantages.mean().item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, -advantages / 60)
    assert terms.sums["actor/pg_clipfrac"] == 0 and terms.sums["actor/ppo_kl"] == 0


@pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 20, 20], [7, 13, 1, 39], [1] * 60])
def test_microbatches_with_one_denominator_add_up_to_the_whole_batch(sizes: list[int]):
    new, old, advantages = tokens()
    entropy, ref = rand(60, seed=4).abs(), new + 0.5 * rand(60, seed=3)
    config = GrpoConfig(entropy_coeff=0.1, kl_loss_coef=0.3)

    def run(split: list[int]) -> tuple[float, torch.Tensor, dict[str, float]]:
        leaf, loss, sums = new.clone().requires_grad_(), 0.0, {}
        for parts in zip(*(x.split(split) for x in (leaf, old, advantages, entropy, ref))):
            terms = policy_loss(*parts[:3], 60.0, config, *parts[3:])
            terms.loss.backward(retain_graph=True)
            loss += terms.loss.item()
            sums = {k: sums.get(k, 0.0) + v.item() for k, v in terms.sums.items()}
        return loss, leaf.grad, sums

    whole, found = run([60]), run(sizes)
    assert found[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(found[1], whole[1], rtol=1e-12, atol=1e-15)
    assert found[2] == pytest.approx(whole[2], rel=1e-6)


def test_a_long_answer_weighs_by_its_tokens_not_as_one_sample():
    """Token-mean: 9 tokens of A=1 and 1 token of A=-1 give -(9 - 1)/10, a sample-mean would give 0."""
    advantages = torch.tensor([1.0] * 9 + [-1.0])
    assert policy_loss(torch.zeros(10), torch.zeros(10), advantages, 10.0, CONFIG).loss.item() == pytest.approx(-0.8)


def test_the_sums_are_over_tokens_and_carry_no_gradient():
    new, old, advantages = tokens()
    terms = policy_loss(new.requires_grad_(), old, advantages, 7.0, CONFIG, rand(60, seed=4))
    clipped = sum(
        (math.exp(n - o) > 1.2 and a > 0) or (math.exp(n - o) < 0.8 and a < 0)
        for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist())
    )
    assert 5 < clipped < 55
    assert terms.sums["actor/pg_clipfrac"].item() == clipped
    assert terms.sums["actor/pg_loss"].item() == pytest.approx(slow_loss(new, old, advantages, 1.0), rel=1e-12)
    assert terms.sums["actor/ppo_kl"].item() == pytest.approx((old - new).sum().item(), rel=1e-12)
    assert terms.sums["actor/entropy"].item() == pytest.approx(rand(60, seed=4).sum().item(), rel=1e-12)
    assert not any(value.requires_grad for value in terms.sums.values())


# --- options -----------------------------------------------------------------------------------


def test_kl_and_entropy_are_off_by_default_whatever_is_passed():
    new, old, advantages = tokens()
    plain = policy_loss(new, old, advantages, 60.0, GrpoConfig())
    given_more = policy_loss(new, old, advantages, 60.0, GrpoConfig(), rand(60, seed=4), rand(60, seed=3))
    assert torch.equal(plain.loss, given_more.loss)
    assert "actor/kl_loss" not in given_more.sums


def test_the_kl_option_adds_the_k3_estimate_which_is_never_negative():
    new, old, advantages = tokens()
    ref = new + 0.5 * rand(60, seed=3)
    k3 = math.fsum(math.exp(r - n) - (r - n) - 1 for r, n in zip(ref.tolist(), new.tolist()))
    terms = policy_loss(new, old, advantages, 60.0, GrpoConfig(kl_loss_coef=0.3), ref_logprobs=ref)
    assert terms.loss.item() == pytest.approx(slow_loss(new, old, advantages, 60.0) + 0.3 * k3 / 60, rel=1e-12)
    assert terms.sums["actor/kl_loss"].item() == pytest.approx(k3, rel=1e-12) and k3 > 0


def test_the_kl_of_a_policy_that_is_still_the_base_is_zero_and_pulls_nowhere():
    leaf = rand(8).requires_grad_()
    config = GrpoConfig(kl_loss_coef=1.0)
    terms = policy_loss(leaf, leaf.detach(), torch.zeros(8), 8.0, config, ref_logprobs=leaf.detach())
    terms.loss.backward()
    assert terms.sums["actor/kl_loss"] == 0 and not leaf.grad.any()


def test_the_kl_gradient_points_back_to_the_base_policy():
    leaf = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref, zeros = torch.tensor([-2.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    policy_loss(leaf, leaf.detach(), zeros, 2.0, GrpoConfig(kl_loss_coef=1.0), ref_logprobs=ref).loss.backward()
    assert leaf.grad[0] > 0 > leaf.grad[1]  # descent lowers what is too likely and raises what is too rare


def verl_low_var_kl(logprob: torch.Tensor, ref_logprob: torch.Tensor) -> torch.Tensor:
    """`kl_penalty(..., "low_var_kl")` of verl/trainer/ppo/core_algos.py."""
    kl = ref_logprob - logprob
    kl = torch.clamp(kl, min=-20, max=20)
    return torch.clamp(torch.exp(kl) - kl - 1, min=-10, max=10)


def kl_and_gradient(estimate, new: torch.Tensor, ref: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = new.clone().requires_grad_()
    kl = estimate(leaf, ref)
    kl.sum().backward()
    return kl.detach(), leaf.grad


def test_the_kl_and_its_gradient_are_those_of_verl_at_any_distance():
    apart = torch.cat([torch.linspace(-150, 150, 601), torch.tensor([-20.0, 20, 2.6, 2.7, -10.9, -11.1])])
    ref = torch.full_like(apart, -160)
    (kl, grad), (theirs, their_grad) = (kl_and_gradient(f, ref + apart, ref) for f in (kl_estimate, verl_low_var_kl))
    assert torch.equal(kl, theirs) and torch.equal(grad, their_grad)
    assert kl.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("nats", [21.0, 89.0, 200.0])
def test_a_base_policy_that_likes_a_token_far_more_leaves_loss_and_gradient_finite(nats: float):
    leaf = torch.tensor([-nats - 1, -1.5]).requires_grad_()
    ref, config = torch.full((2,), -1.0), GrpoConfig(kl_loss_coef=0.1)
    terms = policy_loss(leaf, leaf.detach(), torch.zeros(2), 2.0, config, ref_logprobs=ref)
    terms.loss.backward()
    assert terms.loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad[1] != 0


def test_the_entropy_bonus_lowers_the_loss_by_the_mean_entropy():
    new, old, advantages = tokens()
    entropy = rand(60, seed=4).abs()
    terms = policy_loss(new, old, advantages, 60.0, GrpoConfig(entropy_coeff=0.1), entropy)
    expected = slow_loss(new, old, advantages, 60.0) - 0.1 * entropy.mean().item()
    assert terms.loss.item() == pytest.approx(expected, rel=1e-12)


# --- dual clip -----------------------------------------------------------------------------------


def slow_dual_clip(new, old, advantages, c: float, clip: float = 0.2) -> tuple[list[float], int]:
    """verl's three losses of each token, spelled out; how many tokens met the lower bound."""
    losses, met = [], 0
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist()):
        ratio = math.exp(n - o)
        pg_loss1 = -a * ratio
        pg_loss2 = -a * min(max(ratio, 1 - clip), 1 + clip)
        clipped1 = max(pg_loss1, pg_loss2)
        pg_loss3 = -a * c
        clipped2 = min(pg_loss3, clipped1)
        losses.append(clipped2 if a < 0 else clipped1)
        met += a < 0 and clipped1 > pg_loss3
    return losses, met


@pytest.mark.parametrize("c", [1.1, 1.5, 3.0])
def test_the_dual_clip_is_verls_token_by_token(c: float):
    new, old, advantages = tokens()
    old = old - 1.5 * rand(60, seed=6).abs()  # ratios far above 1 as well
    losses, met = slow_dual_clip(new, old, advantages, c)
    terms = policy_loss(new, old, advantages, 60.0, GrpoConfig(clip_ratio_c=c))
    assert 3 < met < 57 and terms.sums["actor/pg_clipfrac_lower"].item() == met
    assert terms.loss.item() == pytest.approx(math.fsum(losses) / 60, rel=1e-12)


@pytest.mark.parametrize(("advantage", "ratio", "slope"), [(-1.5, 2.9, 2.9), (-1.5, 3.1, 0.0), (1.5, 0.5, -0.5)])
def test_beyond_the_dual_clip_a_bad_token_pulls_no_more_and_a_good_one_is_as_before(
    advantage: float, ratio: float, slope: float
):
    """dL/d logp = -A·ratio up to the bound of 3, then 0."""
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, a = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    policy_loss(new, old, a, 1.0, GrpoConfig(clip_ratio_c=3.0)).loss.backward()
    assert new.grad.item() == pytest.approx(1.5 * slope, rel=1e-12)


def test_the_dual_clip_is_off_unless_set_and_out_of_reach_it_changes_nothing():
    new, old, advantages = tokens()
    plain = policy_loss(new, old, advantages, 60.0, GrpoConfig())
    assert "actor/pg_clipfrac_lower" not in plain.sums
    far = policy_loss(new, old, advantages, 60.0, GrpoConfig(clip_ratio_c=1e9))
    assert torch.equal(plain.loss, far.loss) and far.sums["actor/pg_clipfrac_lower"] == 0


@pytest.mark.parametrize("c", [1.0, 0.5, -3.0])
def test_a_dual_clip_of_at_most_one_is_refused(c: float):
    with pytest.raises(ValueError, match="greater than 1"):
        GrpoConfig(clip_ratio_c=c)


# --- truncated importance weights -----------------------------------------------------------------


def test_each_tokens_policy_loss_is_weighted_by_the_truncated_ratio_of_trainer_and_engine():
    new, old, advantages = tokens()
    rollout = old + 0.8 * rand(60, seed=5)
    config = GrpoConfig(rollout_is="token", rollout_is_threshold=1.5)
    weights = [min(math.exp(o - r), 1.5) for o, r in zip(old.tolist(), rollout.tolist())]
    expected = 0.0
    for n, o, a, w in zip(new.tolist(), old.tolist(), advantages.tolist(), weights):
        ratio = math.exp(n - o)
        expected += w * max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
    terms = policy_loss(new, old, advantages, 60.0, config, rollout_logprobs=rollout)
    assert terms.loss.item() == pytest.approx(expected / 60, rel=1e-9)
    assert terms.sums["rollout_corr/rollout_is_mean"].item() == pytest.approx(sum(weights), rel=1e-9)
    high = terms.sums["rollout_corr/rollout_is_ratio_fraction_high"].item()
    assert high == sum(w == 1.5 for w in weights) and 0 < high < 60


def test_the_weights_scale_the_gradient_and_have_none_of_their_own():
    new, old, advantages = tokens()
    rollout, config = old + 0.8 * rand(60, seed=5), GrpoConfig(rollout_is="token")
    leaves = [new.clone().requires_grad_() for _ in range(2)]
    policy_loss(leaves[0], old, advantages, 60.0, config, rollout_logprobs=rollout).loss.backward()
    policy_loss(leaves[1], old, advantages, 60.0, GrpoConfig()).loss.backward()
    weights = (old - rollout).exp().clamp_max(2.0)
    torch.testing.assert_close(leaves[0].grad, weights * leaves[1].grad)
    leaf = new.clone().requires_grad_()  # in the first tick of a step old and new log-probs are one forward's
    policy_loss(leaf, leaf, advantages, 60.0, config, rollout_logprobs=rollout).loss.backward()
    torch.testing.assert_close(leaf.grad, torch.zeros(60, dtype=torch.float64))


def test_the_weights_leave_kl_and_entropy_alone():
    new, old, _ = tokens()
    none, config = torch.zeros(60, dtype=torch.float64), dict(kl_loss_coef=0.3, entropy_coeff=0.1)
    weighted = policy_loss(new, old, none, 60.0, GrpoConfig(rollout_is="token", **config), rand(60), new + 0.1, old - 1)
    assert weighted.loss == policy_loss(new, old, none, 60.0, GrpoConfig(**config), rand(60), new + 0.1).loss


def test_the_anchors_weights_are_all_one():
    """Its ratio is taken to the engine's own log-probs."""
    new, old, advantages = tokens()
    weighted = policy_loss(new, old, advantages, 60.0, GrpoConfig(rollout_is="token"), rollout_logprobs=old)
    assert weighted.loss == policy_loss(new, old, advantages, 60.0, GrpoConfig()).loss


def test_rewards_that_differ_never_leave_advantages_of_0_alone():
    for rewards in ([1e8, 1e8 + 1], [1e15, -1e15], [0.0, 1e-30], [1.0, 1.0 + 2**-52], [1e15, 0.0, 1e-9, 0.0]):
        assert group_advantages(torch.tensor(rewards, dtype=torch.float64), len(rewards)).any()
    for rewards in ([0.0, 1e-60], [1e200, -1e200]):
        with pytest.raises(ValueError, match="in one group leave only advantages of 0"):
            group_advantages(torch.tensor([1.0, 0.0, *rewards], dtype=torch.float64), 2)
