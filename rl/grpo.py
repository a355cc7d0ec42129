"""GRPO as functions of tensors: N response tokens, V of a vocabulary, one sample after the other.

References:
    Shao et al. 2024, DeepSeekMath, arXiv:2402.03300: advantages within a group (4.1.2), the objective (eq. 3)
    Schulman et al. 2017, PPO, arXiv:1707.06347: the clipped ratio (eq. 7)
    Yu et al. 2025, DAPO, arXiv:2503.14476: the mean over all tokens of a mini-batch (3.3)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.config import GrpoConfig

PG_LOSS = "actor/pg_loss"  # the one number of a tick that stops a run where it is none


def group_advantages(rewards: Float[Tensor, " samples"], group_size: int) -> Float[Tensor, " samples"]:
    """(r - mean) / (std + 1e-6) within each group of `group_size` consecutive samples (GRPO, 4.1.2).

    std is the unbiased one, as in verl and TRL.
    In float64, where the mean of equal rewards is exact: rounded, it would be divided by 1e-6.
    Raises ValueError if the rewards do not divide in groups of at least two, or if some differ and yet every
    advantage of their group is 0 in float32.
    """
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not divide in groups of {group_size} (at least 2 each)")
    r = rewards.double().view(-1, group_size)
    found = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).float()
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


def low_var_kl(logprobs: Float[Tensor, " n"], ref_logprobs: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The k3 estimate of the KL to the base policy, of each token, at most 10 nats (GRPO, eq. 4).

    Schulman 2020, joschu.net/blog/kl-approx.html; with the bounds of `low_var_kl` in verl's `kl_penalty`
    (verl/trainer/ppo/core_algos.py). A token beyond a bound has no gradient: without one it is infinite from 89 nats.
    """
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
) -> LossTerms:
    """Clipped-ratio loss of response tokens, divided by one `denominator` for all ranks.

    `denominator` is the number of response tokens in the global mini-batch (token-mean); one a token where they
    are of several mini-batches.
    With `rollout_is` the policy loss of a token, and nothing else, is multiplied by `rollout_weights`.
    KL is `low_var_kl` against `ref_logprobs`.
    """
    per_token, clip_sums = _clipped(logprobs, old_logprobs, advantages, config)
    sums: dict[str, Tensor] = {}
    if rollout_logprobs is not None and config.rollout_is == "token":
        weight = rollout_weights(old_logprobs, rollout_logprobs, config.rollout_is_threshold)
        per_token = weight * per_token
        sums["rollout_corr/rollout_is_mean"] = weight.sum()
        sums["rollout_corr/rollout_is_ratio_fraction_high"] = (weight == config.rollout_is_threshold).float().sum()
    sums |= {PG_LOSS: per_token.detach().sum(), **clip_sums}
    if entropy is not None:
        sums["actor/entropy"] = entropy.detach().sum()
        if config.entropy_coeff:
            per_token = per_token - config.entropy_coeff * entropy
    if ref_logprobs is not None and config.kl_loss_coef:
        kl = low_var_kl(logprobs, ref_logprobs)
        sums["actor/kl_loss"] = kl.detach().sum()
        per_token = per_token + config.kl_loss_coef * kl
    one = not isinstance(denominator, Tensor)
    loss = per_token.sum() / denominator if one else (per_token / denominator).sum()
    return LossTerms(loss, sums, logprobs.detach())


def _clipped(
    logprobs: Float[Tensor, " n"],
    old_logprobs: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    config: GrpoConfig,
) -> tuple[Float[Tensor, " n"], dict[str, Tensor]]:
    """max(-A·r, -A·clip(r, 1-ε, 1+ε)) of each token, r = π/π_old (PPO, eq. 7), and what became of the ratios, summed.

    With `clip_ratio_c` the loss of a token of negative advantage ends at -A·c: the clip alone lets a
    ratio above 1 grow without bound there (dual clip, Ye et al. 2020, arXiv:1912.09729; as in verl).
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)  # as in verl: an infinite ratio times advantage 0 is NaN
    ratio = log_ratio.exp()
    surrogate = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
    per_token = torch.maximum(surrogate, clipped)
    sums = {"actor/pg_clipfrac": (clipped > surrogate).float().sum(), "actor/ppo_kl": -log_ratio.detach().sum()}
    if config.clip_ratio_c is not None:
        bound = -advantages * config.clip_ratio_c
        lower = (advantages < 0) & (per_token > bound)
        per_token = torch.where(lower, bound, per_token)
        sums["actor/pg_clipfrac_lower"] = lower.float().sum()
    return per_token, sums
