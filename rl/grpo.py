"""GRPO as functions of tensors: N response tokens, V of a vocabulary, one sample after the other.

References:
    Shao et al. 2024, DeepSeekMath, arXiv:2402.03300: advantages within a group (4.1.2), the objective (eq. 3)
    Schulman et al. 2017, PPO, arXiv:1707.06347: the clipped ratio (eq. 7)
    Yu et al. 2025, DAPO, arXiv:2503.14476: the mean over all tokens of a mini-batch (3.3), two clip ratios (3.1)
    Liu et al. 2025, Dr. GRPO, arXiv:2503.20783: advantages that no deviation divides (3.2)
    Zheng et al. 2025, GSPO, arXiv:2507.18071: one ratio for a whole sample (eq. 7)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.config import GrpoConfig

PG_LOSS = "actor/pg_loss"  # the one number of a tick that stops a run where it is none


def group_advantages(
    rewards: Float[Tensor, " samples"], group_size: int, by_std: bool = True
) -> Float[Tensor, " samples"]:
    """(r - mean) / (std + 1e-6) within each group of `group_size` consecutive samples (GRPO, 4.1.2).

    std is the unbiased one, as in verl and TRL. Not `by_std`: r - mean (Dr. GRPO, 3.2).
    In float64, where the mean of equal rewards is exact: rounded, it would be divided by 1e-6.
    Raises ValueError if the rewards do not divide in groups of at least two, or if some differ and yet every
    advantage of their group is 0 in float32.
    """
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not divide in groups of {group_size} (at least 2 each)")
    r = rewards.double().view(-1, group_size)
    found = r - r.mean(1, keepdim=True)
    found = (found / (r.std(1, keepdim=True) + 1e-6) if by_std else found).float()
    lost = ((r != r[:, :1]) & (found == 0).all(1, keepdim=True)).any(1)
    if lost.any():
        low, high = r[lost][0].min().item(), r[lost][0].max().item()
        raise ValueError(
            f"rewards from {low:g} to {high:g} in one group leave only advantages of 0: scale them to differ by "
            f"something between 1e-30 and 1e15"
        )
    return found.view(-1)


def log_distribution(logits: Float[Tensor, "n v"], temperature: float) -> Float[Tensor, "n v"]:
    """Log-probabilities at `temperature` of logits of any precision, in fp32.

    fp32 before the division: a quotient rounded to bf16 puts the trainer 0.01 nats a token from the sampler.
    """
    exact = logits.float()
    # a division by 1 would be a copy of [n, v] each way
    return torch.log_softmax(exact if temperature == 1 else exact / temperature, dim=-1)


def token_logprobs(
    logits: Float[Tensor, "p v"],
    targets: Int[Tensor, " n"],
    temperature: float,
    with_entropy: bool,
    predicted: Int[Tensor, " n"] | None = None,
    trains_entropy: bool = False,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Log-probability of each of `targets` under its row of `logits`, and that row's entropy if asked for, in fp32.

    `predicted`: the row of each; None: each its own. The entropy has a gradient only if `trains_entropy`: what that
    would take is two more copies of the logits.
    """
    logp = log_distribution(logits, temperature)
    rows = torch.arange(len(logp), device=logp.device) if predicted is None else predicted
    if not with_entropy:
        return logp[rows, targets], None
    with torch.set_grad_enabled(trains_entropy and torch.is_grad_enabled()):
        entropy = -(logp.exp() * logp).sum(-1)
    return logp[rows, targets], entropy[rows]


def rollout_weights(
    old_logprobs: Float[Tensor, " n"], rollout_logprobs: Float[Tensor, " n"], threshold: float
) -> Float[Tensor, " n"]:
    """min(π_old / π_rollout, threshold) of each token, detached: truncated importance sampling.

    The samples are the engine's, the gradient is the trainer's: this weight puts the expectation right, up to the
    truncation that bounds its variance (Yao et al. 2025, fengyao.notion.site/off-policy-rl; verl's `rollout_is`).
    """
    log_ratio = (old_logprobs - rollout_logprobs).detach().clamp(-20, 20)
    return log_ratio.exp().clamp_max(threshold)


def kl_estimate(
    logprobs: Float[Tensor, " n"], ref_logprobs: Float[Tensor, " n"], kind: str = "k3"
) -> Float[Tensor, " n"]:
    """An estimate of the KL to the base policy, of each token (Schulman 2020, joschu.net/blog/kl-approx.html).

    k3 (GRPO, eq. 4) with the bounds of `low_var_kl` in verl's `kl_penalty` (verl/trainer/ppo/core_algos.py), at most
    10 nats. A token beyond a bound has no gradient: without one it is infinite from 89 nats.
    """
    if kind == "k1":
        return logprobs - ref_logprobs
    if kind == "k2":
        return 0.5 * (logprobs - ref_logprobs).square()
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return (log_ratio.exp() - log_ratio - 1).clamp(-10, 10)


@dataclass
class LossTerms:
    """Sums over tokens, so that microbatches and ranks add up; divide by the token count for means."""

    loss: Float[Tensor, ""]  # already divided by the denominator
    sums: dict[str, Tensor]
    logprobs: Float[Tensor, " n"]  # of this forward, detached


def policy_loss(
    logprobs: Float[Tensor, " n"],
    old_logprobs: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    denominator: float | Float[Tensor, " n"],
    config: GrpoConfig,
    entropy: Float[Tensor, " n"] | None = None,
    ref_logprobs: Float[Tensor, " n"] | None = None,
    rollout_logprobs: Float[Tensor, " n"] | None = None,
    weights: Float[Tensor, " n"] | None = None,
    samples: Int[Tensor, " n"] | None = None,
) -> LossTerms:
    """Clipped-ratio loss of response tokens, divided by one `denominator` for all ranks.

    `denominator` is the number of response tokens in the global mini-batch (token-mean); one a token where they
    are of several mini-batches. `weights` of tokens make other means of it (`rl/aggregation.py`): those of 0 are in no
    sum, and the denominator counts the rest.
    With `rollout_is` the policy loss of a token, and nothing else, is multiplied by `rollout_weights`.
    KL is `kl_estimate` against `ref_logprobs`. `samples`: which sample each token is of, for ratios of whole samples.
    """
    per_token, means = _clipped(logprobs, old_logprobs, advantages, config, samples)
    if rollout_logprobs is not None and config.rollout_is == "token":
        weight = rollout_weights(old_logprobs, rollout_logprobs, config.rollout_is_threshold)
        per_token = weight * per_token
        means["rollout_corr/rollout_is_mean"] = weight
        means["rollout_corr/rollout_is_ratio_fraction_high"] = (weight == config.rollout_is_threshold).float()
    losses = {PG_LOSS: per_token}
    if entropy is not None:
        means["actor/entropy"] = entropy
        if config.entropy_coeff:
            per_token = per_token - config.entropy_coeff * entropy
    if ref_logprobs is not None and config.kl_loss_coef:
        losses["actor/kl_loss"] = kl = kl_estimate(logprobs, ref_logprobs, config.kl_loss_type)
        per_token = per_token + config.kl_loss_coef * kl
    loss, sums = _summed(per_token, losses, means, weights, denominator)
    return LossTerms(loss, sums, logprobs.detach())


def _summed(
    per_token: Float[Tensor, " n"],
    losses: dict[str, Tensor],
    means: dict[str, Tensor],
    weights: Float[Tensor, " n"] | None,
    denominator: float | Float[Tensor, " n"],
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss, and sums over tokens to be divided by the denominator: of `losses` by weight, `means` of what has one."""
    if weights is not None:
        kept = (weights != 0).float()
        per_token = weights * per_token
        losses = {name: weights * value for name, value in losses.items()}
        means = {name: kept * value for name, value in means.items()}
    one = not isinstance(denominator, Tensor)
    loss = per_token.sum() / denominator if one else (per_token / denominator).sum()
    return loss, {name: value.detach().sum() for name, value in (losses | means).items()}


def sample_means(values: Float[Tensor, " n"], samples: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """At each token the mean over the tokens of its sample; `samples` are numbers from 0 up."""
    count = int(samples.max()) + 1 if len(samples) else 0
    sums, tokens = values.new_zeros(2, count).unbind()
    sums = sums.index_add(0, samples, values)
    tokens = tokens.index_add(0, samples, torch.ones_like(values))
    return (sums / tokens)[samples]


def _clipped(
    logprobs: Float[Tensor, " n"],
    old_logprobs: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    config: GrpoConfig,
    samples: Int[Tensor, " n"] | None,
) -> tuple[Float[Tensor, " n"], dict[str, Tensor]]:
    """max(-A·r, -A·clip(r, 1-ε, 1+ε)) of each token, r = π/π_old (PPO, eq. 7), and what became of its ratio.

    With `importance_sampling_level` = "sequence" r is the geometric mean of those of the token's sample (GSPO, eq. 7).
    With `clip_ratio_c` the loss of a token of negative advantage ends at -A·c: the clip alone lets a
    ratio above 1 grow without bound there (dual clip, Ye et al. 2020, arXiv:1912.09729; as in verl).
    """
    log_ratio = logprobs - old_logprobs
    if config.importance_sampling_level == "sequence":
        assert samples is not None  # of every microbatch it is known
        log_ratio = sample_means(log_ratio, samples)
    log_ratio = log_ratio.clamp(-20, 20)  # as in verl: an infinite ratio times advantage 0 is NaN
    ratio = log_ratio.exp()
    surrogate = -advantages * ratio
    clipped = -advantages * ratio.clamp(*config.clip_range)
    per_token = torch.maximum(surrogate, clipped)
    means = {"actor/pg_clipfrac": (clipped > surrogate).float(), "actor/ppo_kl": -log_ratio}
    if config.clip_ratio_c is not None:
        bound = -advantages * config.clip_ratio_c
        lower = (advantages < 0) & (per_token > bound)
        per_token = torch.where(lower, bound, per_token)
        means["actor/pg_clipfrac_lower"] = lower.float()
    return per_token, means
