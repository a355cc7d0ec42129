"""`northstar probe`: what a codec does to the policy and to its gradient, before a run, on its own model and tasks.

The model answers the run's prompts without codec; every candidate is calibrated on answers of the
training split and scored on answers of the validation split, at equal weights. No Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.boundary import Boundary
from codec.config import CodecConfig
from deploy.config import ConfigError
from deploy.estimate.worth import Worth
from deploy.preflight import preflight
from deploy.probe.anchor_trial import compare_batches
from deploy.probe.codec_trial import Calibration, Halves, Head, Trial
from deploy.probe.scores import Score, codec_in_run, dense_of_run, scored_trial
from rl.aggregation import weighted
from rl.batch import Batch, Prompts, concat
from rl.model_files import model_shape, resolve
from rl.objective import MicroBatch, microbatches
from rl.rollout import RolloutWorker
from rl.val_config import OWN
from swarm.run_config import RunConfig

CALIBRATION = 2  # times as many tokens as are scored; a run pools over far more
GRADIENT_EVERY = 3  # microbatches: a gradient costs as much as three forwards
# ranks of PowerSGD and of random coordinates, as shares of the hidden size, and rates with dither
SKETCHES = (0.05, 0.125)
RATES = (0.025, 0.05, 0.125, 0.25)  # of the transform, each way

Say = Callable[[str], None]


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

    @property
    def lowest(self) -> int:
        """The layer below which gradients were compared."""
        return min(score.boundaries[0] for score in self.scores)

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


def probe(
    config: RunConfig,
    tokens: int,
    say: Say,
    candidates: list[CodecConfig] | None = None,
    counts: Sequence[int] = (),
) -> Probe:
    """Score `candidates` (default: `compared_with`) on at least `tokens` response tokens, with `swarm.threads` threads.

    `counts`: with so many boundaries too, beside the config's own. Raises ConfigError if the config has none, or the
    model has not so many layers.
    """
    if not config.swarm.boundaries:
        raise ConfigError("swarm.boundaries is empty: nothing crosses a link, so there is no codec to probe")
    preflight(config)
    folder = resolve(config.model.path)
    shape = model_shape(str(folder))
    assert shape is not None  # a folder has one
    cuts = sets_of_boundaries(shape.layers, config.swarm.boundaries, counts)
    candidates = candidates or compared_with(config, shape.hidden, SKETCHES[:1] if len(cuts) > 1 else SKETCHES)
    calibration, scored = _answers(config, tokens, say)
    drawn = not (calibration.advantages.any() and scored.advantages.any())
    if drawn:
        say("no answer was better than another: advantages are drawn, +1 or -1")
        kept = config.grpo.model_copy(update={"zero_variance": "keep"})  # of drawn advantages no group is of one reward
        config = config.model_copy(update={"grpo": kept})
        calibration, scored = _with_drawn_advantages(calibration, 0), _with_drawn_advantages(scored, 1)
    scores, gradient_tokens, own = _trials(folder, shape.layers, cuts, candidates, calibration, scored, config, say)
    found = None
    if own and not drawn:
        answers = concat([calibration, scored])
        found = compare_batches(folder, shape.layers, config, own, answers, say)
    worth = found and Worth(config, found)
    return Probe(config, scored.own_tokens, calibration.own_tokens, gradient_tokens, drawn, scores, worth)


def _trials(
    folder: Path,
    layers: int,
    cuts: list[list[int]],
    candidates: list[CodecConfig],
    calibration: Batch,
    scored: Batch,
    config: RunConfig,
    say: Say,
) -> tuple[list[Score], int, dict[int, Boundary]]:
    """Of all candidates; the response tokens of gradients, and the boundaries of the config's own codec as they were left."""
    dtype, device = getattr(torch, config.model.dtype), torch.device(config.swarm.device)
    every = sorted({layer for cut in cuts for layer in cut})
    halves = Halves(folder, layers, every, dtype, device, config.model.attention, config.model.lora)
    trials = [Trial(codec, halves, config.run.seed, cut) for codec in candidates for cut in cuts]
    calibrate(halves, trials, calibration, config, say)
    reference, gradient_tokens = score(halves, trials, scored, config, say)
    mean_length = float(scored.total.mean())
    scores = [scored_trial(trial, reference, config, mean_length) for trial in trials]
    own = next((trial.boundaries for trial, found in zip(trials, scores) if found.own), {})
    return scores, gradient_tokens, own


def sets_of_boundaries(layers: int, own: list[int], counts: Sequence[int]) -> list[list[int]]:
    """The config's own boundaries, and for each other number of them as many, evenly over the model; fewest first.

    Raises ConfigError for a number that does not fit between the layers.
    """
    wrong = [n for n in counts if not 0 < n < layers]
    if wrong:
        raise ConfigError(f"--boundaries {wrong[0]}: {layers} layers have places for 1 to {layers - 1} boundaries")
    even = {n: [(2 * layers * i + n + 1) // (2 * (n + 1)) for i in range(1, n + 1)] for n in counts}
    return [cut for _, cut in sorted((even | {len(own): own}).items())]


def numbers_of_boundaries(text: str) -> list[int]:
    """Numbers of boundaries, as they are typed: 1,3,7. Raises ConfigError."""
    numbers = [part.strip() for part in text.split(",")] if text else []
    wrong = [number for number in numbers if not number.isdigit()]
    if wrong:
        raise ConfigError(f"--boundaries {text}: {wrong[0]!r} is no number of boundaries; for example 1,3,7")
    return [int(number) for number in numbers]


def compared_with(config: RunConfig, hidden: int, sketches: Sequence[float] = SKETCHES) -> list[CodecConfig]:
    """The run's own, PowerSGD as published, random coordinates, and the transform at the same bytes; each once.

    With fewer `sketches` than there are: the transform at these rates alone.
    """
    rates = RATES if len(sketches) == len(SKETCHES) else sketches
    others = [
        CodecConfig(kind=kind, rank=max(1, round(rate * hidden)))
        for kind in ("powersgd", "random_k")
        for rate in sketches
    ]
    others += [
        CodecConfig(coder=coder, rate=rate, backward_rate=rate) for rate in rates for coder in ("fixed", "entropy")
    ]
    others += [CodecConfig(dither=True, rate=rate, backward_rate=rate) for rate in sketches]
    others.append(CodecConfig())
    found = {codec_in_run(config, codec, hidden).name: codec for codec in others}
    return list((found | {codec_in_run(config, config.codec, hidden).name: config.codec}).values())


# --- the samples -----------------------------------------------------------------------------------


def _answers(config: RunConfig, tokens: int, say: Say) -> tuple[Batch, Batch]:
    """Of both splits, by an engine in this process that is gone when they are there: vLLM would stay."""
    worker = RolloutWorker(
        config.model,
        config.task,
        config.grpo.model_copy(update={"kl_loss_coef": 0.0, "kl_in_reward": 0.0}),  # no reference policy is needed here
        config.rollout.model_copy(update={"engine": "transformers", "mismatch_every": 0}),
        config.snapshot,
        config.run.seed,
        config.val.model_copy(update={"sets": {}}),
        config.swarm.threads,
    )
    return _sample(worker, "train", config, CALIBRATION * tokens, say), _sample(worker, "val", config, tokens, say)


def _sample(worker: RolloutWorker, split: str, config: RunConfig, tokens: int, say: Say) -> Batch:
    """Batches of prompts until there are `tokens` response tokens, or no more validation prompts."""
    size, n = config.rollout.batch_size, config.grpo.group_size  # as many as share a prompt's rows in the run
    last = worker.tasks.there(OWN) if split == OWN else None
    batches, count, first = [], 0, 0
    while count < tokens and first != last:
        stop = first + size if last is None else min(first + size, last)
        frame, *_ = worker.generate(Prompts(split, 0, tuple(range(first, stop)), n, config.rollout.temperature))
        batches.append(Batch.from_frame(frame, "the engine")[1])
        count, first = count + batches[-1].own_tokens, stop
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
    batch = weighted(batch, config.grpo)
    head = Head(halves.upper, config.grpo, config.rollout.temperature, batch.loss_tokens)

    def tap(layer: int, x: Tensor) -> Tensor:
        x.register_hook(lambda dx: calibrations[-1].passed.update({layer: (x.detach(), dx)}))
        return x

    for micro in _micros(batch, config):
        calibrations.append(Calibration(micro.rows, {}))
        with torch.no_grad():
            hidden = halves.lower(micro.ids, micro.real, {})
        halves.dense(hidden, micro, head, {i: lambda x, i=i: tap(i, x) for i in halves.boundaries})
    for trial in trials:
        cost = codec_in_run(config, trial.codec, halves.hidden)
        trial.calibrate(calibrations, dense_of_run(config, cost, halves.hidden, float(batch.total.mean())))
    say(f"calibrated {len(trials)} codecs on {int(batch.total.sum()):,} tokens, prompts included")


def score(halves: Halves, trials: list[Trial], batch: Batch, config: RunConfig, say: Say) -> tuple[Tensor, int]:
    """Runs every trial on every microbatch. Returns the gradient without codec, and its number of response tokens."""
    batch = weighted(batch, config.grpo)
    head = Head(halves.upper, config.grpo, config.rollout.temperature, batch.loss_tokens)
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
