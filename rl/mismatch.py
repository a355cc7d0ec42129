"""Health of the trainer's policy, computed through a lossy codec, against the engine's, which is not.

Both give log-probs to the same sampled tokens, at the same weights. With a codec that loses nothing
they agree; where they do not, the trainer's gradient is that of another policy than the one that
answered, and the ratio in the loss is clipped before any weight has changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

COMFORT = 0.02  # nats a token: below it next to no ratio leaves the clip range of 0.2
OUTSIDE = {"1.2": 1.2, "5": 5.0}  # a ratio r counts as outside of f if it is not in [1/f, f]
PREFIX = "mismatch/"
NAMES = (
    "codec/logprob_kl",
    "codec/logprob_k3",
    "codec/logprob_corr",
    *(f"codec/ratio_outside_{name}" for name in OUTSIDE),
    "rollout_corr/kl",
    "training/rollout_probs_diff_mean",
)


def sums(reference: Tensor, trainer: Tensor) -> dict[str, Tensor]:
    """What adds up over microbatches and ranks, in float64, from log-probs of the same tokens [N] each.

    `reference` is the engine's, whose samples the tokens are. The number of tokens is one of the sums,
    so that `metrics` does not depend on what they are divided by on the way.
    """
    a, b = reference.detach().double(), trainer.detach().double()
    log_ratio = b - a
    bounded = log_ratio.clamp(-20, 20)  # as in the loss
    found = {
        "tokens": torch.ones_like(a),
        "k1": -log_ratio,
        "k3": bounded.exp() - bounded - 1,
        "gap": (b.exp() - a.exp()).abs(),
        "a": a,
        "b": b,
        "aa": a * a,
        "bb": b * b,
        "ab": a * b,
    }
    for name, factor in OUTSIDE.items():
        found[f"outside_{name}"] = (log_ratio.abs() > torch.tensor(factor).double().log()).double()
    return {f"{PREFIX}{name}": value.sum() for name, value in found.items()}


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """The summed `sums`, divided by any one number, as metrics; what is not of theirs is passed on as it is.

    `logprob_kl` is Schulman's k1 estimate of KL(engine ‖ trainer), unbiased, which can be negative (verl:
    `rollout_corr/kl`); `logprob_k3` his k3, never negative, of the same mean (joschu.net/blog/kl-approx.html).
    """
    others = {name: value for name, value in sums.items() if not name.startswith(PREFIX)}
    tokens = sums.get(f"{PREFIX}tokens")
    if not tokens:
        return others
    mean = {name.removeprefix(PREFIX): value / tokens for name, value in sums.items() if name.startswith(PREFIX)}
    outside = [mean[f"outside_{name}"] for name in OUTSIDE]
    return others | dict(zip(NAMES, (mean["k1"], mean["k3"], _correlation(mean), *outside, mean["k1"], mean["gap"])))


def _correlation(mean: dict[str, float]) -> float:
    """Pearson's, of the two log-probs; 1 where neither varies and there is nothing to tell apart."""
    a_variance, b_variance = mean["aa"] - mean["a"] ** 2, mean["bb"] - mean["b"] ** 2
    scale = max(a_variance, 0.0) ** 0.5 * max(b_variance, 0.0) ** 0.5
    return max(-1.0, min(1.0, (mean["ab"] - mean["a"] * mean["b"]) / scale)) if scale else 1.0
