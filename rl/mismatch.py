"""Whether the trainer's policy is the one that samples: log-probs of the same tokens at the same weights, twice.

`codec/…`: the trainer's, through the codec, against the engine's, every step. Where they differ the trainer's
gradient is that of another policy than the one that answered, and the ratio in the loss is clipped before any
weight has changed. `rollout_corr/dense_…`: a plain forward of the same model code without a codec against the
engine's, at the weights that the engine received (`rollout.mismatch_every`). That part is the engine's doing:
kernels, dtype, or weights that it did not take over. The rest of `codec/…` is the codec's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

COMFORT = 0.02  # nats a token: below it next to no ratio leaves the clip range of 0.2
OUTSIDE = {"1.2": 1.2, "2": 2.0, "5": 5.0}  # a ratio r counts as outside of f if it is not in [1/f, f]
PREFIX = "mismatch/"
# Under a name of its own: a gate of the run reads it
LOGPROB_KL, DENSE_K3 = "codec/logprob_kl", "rollout_corr/dense_k3"
CODEC = (
    LOGPROB_KL,
    "codec/logprob_k3",
    "codec/logprob_corr",
    *(f"codec/ratio_outside_{name}" for name in OUTSIDE),
)
NAMES = (*CODEC, "rollout_corr/kl", "training/rollout_probs_diff_mean")
DENSE = (
    "rollout_corr/dense_kl",
    DENSE_K3,
    "rollout_corr/dense_corr",
    *(f"rollout_corr/dense_outside_{name}" for name in OUTSIDE),
)


def sums(reference: Float[Tensor, " n"], trainer: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """What adds up over microbatches and ranks, in float64, from log-probs of the same tokens.

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

    `logprob_kl` is the k1 estimate of KL(engine ‖ trainer), unbiased, which can be negative (verl:
    `rollout_corr/kl`); `logprob_k3` is k3, never negative, of the same mean (Schulman 2020,
    joschu.net/blog/kl-approx.html).
    """
    others = {name: value for name, value in sums.items() if not name.startswith(PREFIX)}
    if not sums.get(f"{PREFIX}tokens"):
        return others
    mean = _means(sums)
    return others | dict(zip(NAMES, (*_measures(mean), mean["k1"], mean["gap"])))


def dense_metrics(parts: list[dict[str, float]]) -> dict[str, float]:
    """The same of a forward without a codec, from the `sums` of parts of a batch; {} where nothing was compared."""
    found = {name: sum(part[name] for part in parts) for name in parts[0]}
    return dict(zip(DENSE, _measures(_means(found)))) if found else {}


def _means(sums: dict[str, float]) -> dict[str, float]:
    tokens = sums[f"{PREFIX}tokens"]
    return {n.removeprefix(PREFIX): value / tokens for n, value in sums.items() if n.startswith(PREFIX)}


def _measures(mean: dict[str, float]) -> tuple[float, ...]:
    """In the order of CODEC and DENSE."""
    return mean["k1"], mean["k3"], _correlation(mean), *(mean[f"outside_{name}"] for name in OUTSIDE)


def _correlation(mean: dict[str, float]) -> float:
    """Pearson's, of the two log-probs; 1 where neither varies and there is nothing to tell apart."""
    a_variance, b_variance = mean["aa"] - mean["a"] ** 2, mean["bb"] - mean["b"] ** 2
    scale = max(a_variance, 0.0) ** 0.5 * max(b_variance, 0.0) ** 0.5
    return max(-1.0, min(1.0, (mean["ab"] - mean["a"] * mean["b"]) / scale)) if scale else 1.0
