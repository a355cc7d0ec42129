"""What was measured of one codec, in the numbers that tables show, and what it would send in the run."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from anchor_service.diagnosis import cosine
from codec.config import CodecConfig
from codec.costs import CodecCost
from deploy.estimate.bytes import cost_of_codec, tick_bytes
from deploy.estimate.workload import forward_passes, samples_per_tick
from deploy.probe.codec_trial import Trial
from rl import mismatch
from swarm.run_config import RunConfig


@dataclass(frozen=True)
class Score:
    """One codec at one set of boundaries. Bytes are a token's at one boundary, side information as the run's schedule
    spreads it over tokens.
    """

    name: str
    codec: dict[str, Any]
    boundaries: list[int]
    own: bool  # the codec and the boundaries of the config itself
    compresses: bool
    kl: float  # nats a token, KL(without ‖ with codec) over the whole vocabulary
    k1: float  # its estimate from the sampled tokens, as `codec/logprob_kl` will report it
    corr: float
    outside: dict[str, float]  # share of tokens whose ratio leaves [1/f, f]
    fvu: float  # of the worst boundary
    dx_cosine: float  # of the worst boundary
    gradient_cosine: float  # of the weights below the first boundary of all sets
    gradient_bias: float  # ‖mean over keys less the dense gradient‖, and what follows, in norms of the dense gradient
    gradient_bias_bound: float
    gradient_variance: float  # mean squared deviation from that mean
    draws: int  # of keys, which these were told from; 1: it has none
    forward_bytes: float
    backward_bytes: float
    side_bytes: float
    dense_bytes: float  # one way
    payload_rate: float
    total_rate: float
    token_bytes: float  # at all boundaries together: forwards and backward of a tick, and side information


@dataclass(frozen=True)
class GradientError:
    """Of compressed gradients under several draws of their keys, against the dense one; in its norm."""

    cosine: float  # mean over the draws
    bias: float  # what of it is sure to be no noise: 0 if the draws do not tell
    bound: float  # it is below, but for one case in 40
    variance: float


def gradient_error(gradients: list[Tensor], reference: Tensor) -> GradientError:
    """Gradients of one draw each. All zero if the reference is.

    With d_i = g_i - g the products d_i·d_j of two draws have the mean ‖bias‖²: their mean has no noise floor, as that of
    ‖mean d‖² has. The squares d_i·d_i have the mean ‖bias‖² + variance. Errors are by jackknife over draws.
    """
    square = reference.double().square().sum().item()
    if not square:
        return GradientError(0.0, 0.0, 0.0, 0.0)
    away = torch.stack([g.double() - reference.double() for g in gradients])
    products = (away @ away.T) / square
    cosines = [cosine(g, reference) or 0.0 for g in gradients]  # 0 where one of them is zero
    draws = len(gradients)
    if draws == 1:
        bias = sqrt(products.item())
        return GradientError(cosines[0], bias, bias, 0.0)
    squared = _mean_of_pairs(products)
    kept = ~torch.eye(draws, dtype=torch.bool)
    without = torch.tensor([_mean_of_pairs(products[kept[i]][:, kept[i]]) for i in range(draws)]).double()
    error = sqrt((draws - 1) * without.var(correction=0).item())
    bound = sqrt(max(0.0, squared + 2 * error))
    variance = max(0.0, products.diagonal().mean().item() - squared)
    return GradientError(sum(cosines) / draws, sqrt(max(0.0, squared)), bound, variance)


def _mean_of_pairs(products: Tensor) -> float:
    """Of a symmetric matrix [n, n], without its diagonal."""
    n = len(products)
    return ((products.sum() - products.diagonal().sum()) / (n * (n - 1))).item()


def codec_in_run(config: RunConfig, codec: CodecConfig, hidden: int) -> CodecCost:
    """What that codec costs in this run."""
    return cost_of_codec(config.model_copy(update={"codec": codec}), hidden)


def scored_trial(trial: Trial, reference: Tensor, config: RunConfig, mean_length: float) -> Score:
    """`reference`: the gradient without codec; `mean_length`: tokens of an answer and its prompt."""
    found, ledger = mismatch.metrics(trial.sums), trial.ledger
    cost = codec_in_run(config, trial.codec, trial.halves.hidden)
    forward, backward = (
        config.model.itemsize * trial.halves.hidden * ledger.sent[channel] / ledger.dense[channel]
        for channel in ("boundary_fwd", "boundary_bwd")
    )
    passes = forward_passes(config, cost.ways > 0)
    side = _side_bytes(trial, cost, config, mean_length)
    sent = passes * forward + backward + side
    error = gradient_error([torch.as_tensor(g) for g in trial.gradients], reference)
    return Score(
        name=cost.name,
        codec=trial.codec.model_dump(exclude_none=True, mode="json"),
        boundaries=trial.layers,
        own=trial.codec == config.codec and trial.layers == config.swarm.boundaries,
        compresses=not trial.codec.is_lossless,
        kl=trial.sums["kl"] / trial.sums[f"{mismatch.PREFIX}tokens"],
        k1=found[mismatch.LOGPROB_KL],
        corr=found["codec/logprob_corr"],
        outside={name: found[f"codec/ratio_outside_{name}"] for name in mismatch.OUTSIDE},
        fvu=trial.fvu,
        dx_cosine=trial.dx_cosine,
        gradient_cosine=error.cosine,
        gradient_bias=error.bias,
        gradient_bias_bound=error.bound,
        gradient_variance=error.variance,
        draws=len(trial.gradients),
        forward_bytes=forward,
        backward_bytes=backward,
        side_bytes=side,
        dense_bytes=cost.dense,
        payload_rate=(passes * forward + backward) / ((passes + 1) * cost.dense),
        total_rate=sent / ((passes + 1) * cost.dense),
        token_bytes=len(trial.layers) * sent,
    )


def dense_of_run(config: RunConfig, cost: CodecCost, hidden: int, mean_length: float) -> dict[str, float]:
    """Bytes of one boundary over the whole run, dense in bf16, by way."""
    dense = 2 * hidden * config.ticks * samples_per_tick(config) * mean_length
    return {"fwd": forward_passes(config, cost.ways > 0) * dense, "bwd": dense}


def _side_bytes(trial: Trial, cost: CodecCost, config: RunConfig, mean_length: float) -> float:
    """What the run sends beside the payloads, for each token at one boundary.

    Tables by the refresh schedule; those that a run sends about once as they were here, spread over the run.
    """
    tokens = samples_per_tick(config) * mean_length
    if cost.once:
        return sum(trial.side.values()) / (len(trial.layers) * tokens * config.ticks)
    sent, _ = tick_bytes(config.model_copy(update={"codec": trial.codec}))["basis"]
    return sent / (tokens * len(config.swarm.boundaries))
