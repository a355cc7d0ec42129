"""Bytes of samples on their way: packed by the code that a run packs them with, their numbers made up.

Lengths lie around the means that `links` assumes, tokens anywhere in the vocabulary. What is approximate: the longest
response and the highest token of a real batch may need a bit more or less. Of several turns all tokens count as the policy's,
each with its log-prob.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from deploy.estimate.parameters import parameters
from deploy.estimate.workload import prompt_tokens, response_tokens
from rl.aggregation import weighted
from rl.batch import Batch, of_validation
from rl.config import GrpoConfig
from rl.packing import OPTIONAL
from swarm.replay_choice import MiniFrame, OwnTick, Window
from swarm.run_config import RunConfig
from swarm.shares import shares

MOST_TOKENS = 2e6  # made up for one window
EXPONENTS = 17.0  # powers of two that log-probs of made-up tokens lie between: 2^-14 to 2^3


class Sizes(NamedTuple):
    """Bytes of frames, and of the numbers in them as a dense system sends them."""

    sent: float
    dense: float


class _Kind(NamedTuple):
    """What the size of a batch depends on: prompts, samples of each, mean lengths, the vocabulary, the objective."""

    prompts: int
    samples: int
    prompt: float
    response: float
    vocab: int
    with_ref: bool
    weighs: GrpoConfig | None  # None: no sample has a weight of its own
    turns: bool  # whose each token is, is said


def answers(config: RunConfig, prompts: int, samples: int, validation: bool = False) -> Sizes:
    """One frame from an engine: `samples` answers to each of `prompts` prompts, or what validation is told of them."""
    wanted = of_validation(config.samples.kept) if validation else OPTIONAL
    return _answers(_kind(config, prompts, samples), wanted)


def replay_bytes(config: RunConfig, ticks: int) -> float:
    """What goes to the anchor with a snapshot: of one mini-batch, or with `anchor.replay` = "window" of `ticks` of them."""
    grpo, anchor = config.grpo, config.anchor
    prompts, samples = grpo.ppo_mini_batch_size, grpo.group_size
    count, window = anchor.replayed(prompts * samples), anchor.replay == "window"
    return _replay(_kind(config, prompts, samples), count, min(ticks, count) if window else 0)


def dealt(config: RunConfig) -> list[Sizes]:
    """Each rank's share of a step."""
    grpo, swarm = config.grpo, config.swarm
    kind = _kind(config, grpo.train_batch_size, grpo.group_size)
    return _dealt(kind, grpo.ticks_per_step, swarm.dp, swarm.pp, config.shares_prompts)


def _kind(config: RunConfig, prompts: int, samples: int) -> _Kind:
    with_ref, weighs = config.grpo.kl_loss_coef > 0, config.grpo if config.grpo.weighs_samples else None
    vocab = parameters(config).vocab
    lengths, turns = (prompt_tokens(config), response_tokens(config)), config.task.max_turns > 1
    return _Kind(prompts, samples, *lengths, vocab, with_ref, weighs, turns)


@cache
def _answers(kind: _Kind, wanted: tuple[str, ...]) -> Sizes:
    batch = _made_up(kind).only(*wanted)
    return Sizes(batch.to_frame(split="train", step=100).nbytes, batch.nbytes)


@cache
def _replay(kind: _Kind, count: int, ticks: int) -> float:
    """`count` samples of a window of `ticks` ticks; 0 ticks: of one mini-batch. Of a long one some ticks stand for all."""
    tokens = kind.prompts * kind.samples * (kind.prompt + kind.response)
    shown = min(ticks, max(1, round(MOST_TOKENS / tokens)))
    taken = max(shown, round(count * shown / ticks)) if ticks else count
    choice = (Window if ticks else OwnTick)(taken, 0, lambda frame: None)
    for i in range(shown or 1):
        batch = _weighted(_made_up(kind, i), kind)
        whole = shown <= 1 and taken == len(batch)
        frame = batch.to_frame(step=100, index=1, denominator=batch.loss_tokens) if whole else None
        choice.see(i, MiniFrame(batch, None, 0 if frame is None else frame.nbytes))
    return choice.take(1).size * count / taken


@cache
def _dealt(kind: _Kind, ticks: int, dp: int, pp: int, together: bool) -> list[Sizes]:
    batch = _made_up(kind)
    each = len(batch) // ticks
    minis = [_weighted(batch.take(i * each, (i + 1) * each), kind) for i in range(ticks)]
    return [
        Sizes(share.frame.nbytes, share.dense) for share in shares(minis, dp, pp, together) for _ in range(share.ranks)
    ]


def _weighted(mini: Batch, kind: _Kind) -> Batch:
    return weighted(mini, kind.weighs) if kind.weighs else mini


@cache
def _made_up(kind: _Kind, seed: int = 0) -> Batch:
    rng, count = np.random.default_rng(seed), kind.prompts * kind.samples
    heads, lengths = _lengths(kind.prompts, kind.prompt), _lengths(count, kind.response, spread=0.5)
    shared = np.split(rng.integers(0, kind.vocab, int(heads.sum()), np.int32), np.cumsum(heads)[:-1])
    own = np.split(rng.integers(0, kind.vocab, int(lengths.sum()), np.int32), np.cumsum(lengths)[:-1])
    logprobs = -np.exp2(rng.uniform(3 - EXPONENTS, 3, int(lengths.sum()))).astype(np.float32)
    rewards = rng.integers(0, 2, (kind.prompts, kind.samples)).astype(np.float32)
    from_mean = rewards - rewards.mean(1, keepdims=True)
    prompt = np.repeat(heads, kind.samples)
    return Batch(
        tokens=np.concatenate([part for i, tokens in enumerate(own) for part in (shared[i // kind.samples], tokens)]),
        prompt=prompt.astype(np.int32),
        total=(prompt + lengths).astype(np.int32),
        rollout_logprobs=logprobs,
        ref_logprobs=logprobs if kind.with_ref else logprobs[:0],
        rewards=rewards.reshape(-1),
        advantages=(from_mean / (from_mean.std(1, keepdims=True) + 1e-6)).reshape(-1),
        truncated=np.zeros(count, bool),
        own=np.ones(len(logprobs) if kind.turns else 0, bool),
    )


def _lengths(count: int, mean: float, spread: float = 0.0) -> np.ndarray:
    """Whole numbers that come to round(count * mean), from (1 - spread) to (1 + spread) times the mean."""
    share = 1 + spread * np.linspace(-1, 1, count)[np.random.default_rng(count).permutation(count)]
    ends = np.round(np.cumsum(share / share.sum()) * round(count * mean)).astype(np.int64)
    return np.diff(ends, prepend=0)
