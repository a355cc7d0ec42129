"""`northstar probe`: what a codec does to the policy and to its gradient, before a run, on its own model and tasks.

The model answers the run's prompts without codec; every candidate is calibrated on answers of the
training split and scored on answers of the validation split, at equal weights. No Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchor_service.diagnosis import cosine
from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.costs import CodecCost
from deploy.config import ConfigError
from deploy.estimate.bytes import cost_of_codec, tick_bytes
from deploy.estimate.workload import forward_passes, samples_per_tick, total_ticks
from deploy.estimate.worth import Worth
from deploy.preflight import preflight
from deploy.probe.anchor_trial import compare_batches
from deploy.probe.codec_trial import Calibration, Halves, Head, Trial
from rl import mismatch
from rl.batch import Batch, Prompts, concat
from rl.model_files import model_shape, resolve
from rl.objective import MicroBatch, microbatches
from rl.rollout import RolloutWorker
from swarm.run_config import RunConfig

CALIBRATION = 2  # times as many tokens as are scored; a run pools over far more
GRADIENT_EVERY = 3  # microbatches: a gradient costs as much as three forwards
SKETCHES = (0.05, 0.125)  # ranks of PowerSGD that are compared, as shares of the hidden size
RATES = (0.025, 0.05, 0.125, 0.25)  # of the transform, each way

Say = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """One codec. Bytes are a token's at one boundary, side information as the run's schedule spreads it over tokens."""

    name: str
    codec: dict[str, Any]
    own: bool  # the codec of the config itself
    compresses: bool
    kl: float  # nats a token, KL(without ‖ with codec) over the whole vocabulary
    k1: float  # its estimate from the sampled tokens, as `codec/logprob_kl` will report it
    corr: float
    outside: dict[str, float]  # share of tokens whose ratio leaves [1/f, f]
    fvu: float  # of the worst boundary
    dx_cosine: float  # of the worst boundary
    gradient_cosine: float  # of the weights below the first boundary
    forward_bytes: float
    backward_bytes: float
    side_bytes: float
    dense_bytes: float  # one way
    payload_rate: float
    total_rate: float


@dataclass(frozen=True)
class Probe:
    """What `northstar probe` found."""

    config: RunConfig
    tokens: int  # scored: response tokens of the validation split
    calibration_tokens: int
    gradient_tokens: int
    drawn_advantages: bool  # no answer was better than another
    scores: list[Score]
    worth: Worth | None  # of the anchor; None where gradients are drawn, or of too few mini-batches

    def numbers(self) -> dict[str, Any]:
        """For --json."""
        return {
            "name": self.config.run.name,
            "model": self.config.model.path,
            "task": self.config.task.name,
            "boundaries": self.config.swarm.boundaries,
            "tokens": self.tokens,
            "calibration_tokens": self.calibration_tokens,
            "gradient_tokens": self.gradient_tokens,
            "drawn_advantages": self.drawn_advantages,
            "scores": [asdict(score) for score in self.scores],
            "worth": self.worth and self.worth.numbers(),
        }


def probe(config: RunConfig, tokens: int, say: Say, candidates: list[CodecConfig] | None = None) -> Probe:
    """Score `candidates` (default: `compared_with`) on at least `tokens` response tokens, with `swarm.threads` threads.

    Raises ConfigError if the config has no boundary.
    """
    if not config.swarm.boundaries:
        raise ConfigError("swarm.boundaries is empty: nothing crosses a link, so there is no codec to probe")
    preflight(config)
    folder = resolve(config.model.path)
    shape = model_shape(str(folder))
    assert shape is not None  # a folder has one
    candidates = candidates or compared_with(config, shape.hidden)
    calibration, scored = _answers(config, tokens, say)
    drawn = not (calibration.advantages.any() and scored.advantages.any())
    if drawn:
        say("no answer was better than another: advantages are drawn, +1 or -1")
        calibration, scored = _with_drawn_advantages(calibration, 0), _with_drawn_advantages(scored, 1)
    scores, gradient_tokens, own = _trials(folder, shape.layers, candidates, calibration, scored, config, say)
    found = None
    if own and not drawn:
        answers = concat([calibration, scored])
        found = compare_batches(folder, shape.layers, config, own, answers, say)
    worth = found and Worth(config, found)
    return Probe(config, scored.response_tokens, calibration.response_tokens, gradient_tokens, drawn, scores, worth)


def _trials(
    folder: Path,
    layers: int,
    candidates: list[CodecConfig],
    calibration: Batch,
    scored: Batch,
    config: RunConfig,
    say: Say,
) -> tuple[list[Score], int, dict[int, Boundary]]:
    """Of all candidates; the response tokens of gradients, and the boundaries of the config's own codec as they were left."""
    dtype, device = getattr(torch, config.model.dtype), torch.device(config.swarm.device)
    halves = Halves(folder, layers, config.swarm.boundaries, dtype, device, config.model.attention)
    trials = [Trial(codec, halves, config.run.seed) for codec in candidates]
    calibrate(halves, trials, calibration, config, say)
    reference, gradient_tokens = score(halves, trials, scored, config, say)
    mean_length = float(scored.total.mean())
    own = next((trial.boundaries for trial in trials if trial.codec == config.codec), {})
    return [_score(trial, reference, config, mean_length) for trial in trials], gradient_tokens, own


def compared_with(config: RunConfig, hidden: int) -> list[CodecConfig]:
    """The run's own, PowerSGD as published, and the transform at the same bytes; each once."""
    others = [CodecConfig(kind="powersgd", rank=max(1, round(rate * hidden))) for rate in SKETCHES]
    others += [
        CodecConfig(coder=coder, rate=rate, backward_rate=rate) for rate in RATES for coder in ("fixed", "entropy")
    ]
    others.append(CodecConfig())
    found = {_cost(config, codec, hidden).name: codec for codec in others}
    return list((found | {_cost(config, config.codec, hidden).name: config.codec}).values())


def _cost(config: RunConfig, codec: CodecConfig, hidden: int) -> CodecCost:
    """Of that codec in this run."""
    return cost_of_codec(config.model_copy(update={"codec": codec}), hidden)


# --- the samples -----------------------------------------------------------------------------------


def _answers(config: RunConfig, tokens: int, say: Say) -> tuple[Batch, Batch]:
    """Of both splits, by an engine in this process that is gone when they are there: vLLM would stay."""
    worker = RolloutWorker(
        config.model,
        config.task,
        config.grpo.model_copy(update={"kl_loss_coef": 0.0}),  # no reference policy is needed here
        config.rollout.model_copy(update={"engine": "transformers", "mismatch_every": 0}),
        config.snapshot,
        config.run.seed,
        config.val.size,
        config.swarm.threads,
    )
    return _sample(worker, "train", config, CALIBRATION * tokens, say), _sample(worker, "val", config, tokens, say)


def _sample(worker: RolloutWorker, split: str, config: RunConfig, tokens: int, say: Say) -> Batch:
    """Batches of prompts until there are `tokens` response tokens, or no more validation prompts."""
    size, n = config.rollout.batch_size, config.grpo.group_size  # as many as share a prompt's rows in the run
    last = min(config.val.size, worker.problems().validation or config.val.size) if split == "val" else None
    batches, count, first = [], 0, 0
    while count < tokens and first != last:
        stop = first + size if last is None else min(first + size, last)
        frame, *_ = worker.generate(Prompts(split, 0, tuple(range(first, stop)), n, config.rollout.temperature))
        batches.append(Batch.from_frame(frame, "the engine")[1])
        count, first = count + batches[-1].response_tokens, stop
        say(f"sampled {count:,} of {tokens:,} tokens of the {split} split")
    if count < tokens:
        say(
            f"there are no more than {last} validation prompts (val.size {config.val.size}): {count:,} tokens are scored"
        )
    return concat(batches)


def _with_drawn_advantages(batch: Batch, seed: int) -> Batch:
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), len(batch))
    return replace(batch, advantages=signs)


# --- the passes ------------------------------------------------------------------------------------


def calibrate(halves: Halves, trials: list[Trial], batch: Batch, config: RunConfig, say: Say) -> None:
    """One pass without codec gives the rows that all trials are calibrated on."""
    calibrations: list[Calibration] = []
    head = Head(halves.upper, config.grpo, config.rollout.temperature, batch.response_tokens)

    def tap(layer: int, x: Tensor) -> Tensor:
        x.register_hook(lambda dx: calibrations[-1].passed.update({layer: (x.detach(), dx)}))
        return x

    for micro in _micros(batch, config):
        calibrations.append(Calibration(micro.rows, {}))
        with torch.no_grad():
            hidden = halves.lower(micro.ids, micro.real, {})
        halves.dense(hidden, micro, head, {i: lambda x, i=i: tap(i, x) for i in halves.boundaries})
    for trial in trials:
        cost = _cost(config, trial.codec, halves.hidden)
        trial.calibrate(calibrations, _dense_of_run(config, cost, halves.hidden, float(batch.total.mean())))
    say(f"calibrated {len(trials)} codecs on {int(batch.total.sum()):,} tokens, prompts included")


def score(halves: Halves, trials: list[Trial], batch: Batch, config: RunConfig, say: Say) -> tuple[Tensor, int]:
    """Runs every trial on every microbatch. Returns the gradient without codec, and its number of response tokens."""
    head = Head(halves.upper, config.grpo, config.rollout.temperature, batch.response_tokens)
    micros, start = list(_micros(batch, config)), time.perf_counter()
    reference, gradient_tokens = torch.zeros(()), 0
    for i, micro in enumerate(micros):
        with_gradient = i % GRADIENT_EVERY == 0
        with torch.set_grad_enabled(with_gradient):
            hidden = halves.lower(micro.ids, micro.real, {})
        if with_gradient:
            dense, dx = halves.dense(hidden, micro, head, {})
            reference = reference + halves.weight_gradient(hidden, dx)
            gradient_tokens += len(micro.targets)
        else:
            with torch.no_grad():
                dense = halves.above(hidden, micro, {})
        for trial in trials:
            trial.run(hidden, dense, micro, head, with_gradient)
        seconds = time.perf_counter() - start
        say(f"scored {i + 1} of {len(micros)} microbatches with {len(trials)} codecs, {seconds:.0f} s")
    return reference, gradient_tokens


def _micros(batch: Batch, config: RunConfig) -> Iterator[MicroBatch]:
    longest_first = np.argsort(-batch.total, kind="stable")
    yield from microbatches(batch, longest_first, config.swarm.micro_batch_size, torch.device(config.swarm.device))


# --- the result ------------------------------------------------------------------------------------


def _score(trial: Trial, reference: Tensor, config: RunConfig, mean_length: float) -> Score:
    found, ledger = mismatch.metrics(trial.sums), trial.ledger
    cost = _cost(config, trial.codec, trial.halves.hidden)
    forward, backward = (
        config.model.itemsize * trial.halves.hidden * ledger.sent[channel] / ledger.dense[channel]
        for channel in ("boundary_fwd", "boundary_bwd")
    )
    passes = forward_passes(config, cost.ways > 0)
    side = _side_bytes(trial, cost, config, mean_length)
    return Score(
        name=cost.name,
        codec=trial.codec.model_dump(exclude_none=True, mode="json"),
        own=trial.codec == config.codec,
        compresses=not trial.codec.is_lossless,
        kl=trial.sums["kl"] / trial.sums[f"{mismatch.PREFIX}tokens"],
        k1=found[mismatch.LOGPROB_KL],
        corr=found["codec/logprob_corr"],
        outside={name: found[f"codec/ratio_outside_{name}"] for name in mismatch.OUTSIDE},
        fvu=trial.fvu,
        dx_cosine=trial.dx_cosine,
        gradient_cosine=cosine(torch.as_tensor(trial.gradient), reference) or 0.0,  # 0 where one of them is zero
        forward_bytes=forward,
        backward_bytes=backward,
        side_bytes=side,
        dense_bytes=cost.dense,
        payload_rate=(passes * forward + backward) / ((passes + 1) * cost.dense),
        total_rate=(passes * forward + backward + side) / ((passes + 1) * cost.dense),
    )


def _dense_of_run(config: RunConfig, cost: CodecCost, hidden: int, mean_length: float) -> dict[str, float]:
    """Bytes of one boundary over the whole run, dense in bf16, by way."""
    dense = 2 * hidden * total_ticks(config) * samples_per_tick(config) * mean_length
    return {"fwd": forward_passes(config, cost.ways > 0) * dense, "bwd": dense}


def _side_bytes(trial: Trial, cost: CodecCost, config: RunConfig, mean_length: float) -> float:
    """What the run sends beside the payloads, for each token at one boundary.

    Tables by the refresh schedule; those that a run sends about once as they were here, spread over the run.
    """
    tokens, boundaries = samples_per_tick(config) * mean_length, len(config.swarm.boundaries)
    if cost.once:
        return sum(trial.side.values()) / (boundaries * tokens * total_ticks(config))
    sent, _ = tick_bytes(config.model_copy(update={"codec": trial.codec}))["basis"]
    return sent / (tokens * boundaries)
