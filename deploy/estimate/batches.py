"""Bytes of samples on their way: packed by the code that a run packs them with, their numbers made up.

Lengths lie around the means that `links` assumes, tokens anywhere in the vocabulary. What is approximate: the longest
response and the highest token of a real batch may need a bit more or less.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from deploy.estimate.parameters import parameters
from deploy.estimate.workload import prompt_tokens, response_tokens
from rl.batch import Batch
from swarm.run_config import RunConfig
from swarm.shares import shares

EXPONENTS = 17.0  # powers of two that log-probs of made-up tokens lie between: 2^-14 to 2^3


class Sizes(NamedTuple):
    """Bytes of frames, and of the numbers in them as a dense system sends them."""

    sent: float
    dense: float


def answers(config: RunConfig, prompts: int, samples: int, scores_only: bool = False) -> Sizes:
    """One frame from an engine: `samples` answers to each of `prompts` prompts, or what validation is told of them."""
    batch = _made_up(config, prompts, samples)
    batch = batch.only("rewards", "truncated") if scores_only else batch
    return Sizes(batch.to_frame(split="train", step=100).nbytes, batch.nbytes)


def replay_bytes(config: RunConfig) -> float:
    """The mini-batch that goes to the anchor with a snapshot, or the share of it that is replayed."""
    grpo = config.grpo
    batch = _made_up(config, grpo.ppo_mini_batch_size, grpo.group_size)
    count = config.anchor.replayed(len(batch))
    batch = batch if count == len(batch) else batch.pick(np.arange(count) * len(batch) // count)
    return batch.to_frame(step=100, index=1, denominator=batch.response_tokens).nbytes


def dealt(config: RunConfig) -> Sizes:
    """All ranks' shares of a step."""
    found = _dealt(config)
    return Sizes(sum(sent for sent, _ in found), sum(dense for _, dense in found))


def largest_share(config: RunConfig) -> float:
    """Of a step, the frame of the rank that is sent most."""
    return max(sent for sent, _ in _dealt(config))


def _dealt(config: RunConfig) -> list[Sizes]:
    """By rank."""
    grpo, swarm = config.grpo, config.swarm
    batch = _made_up(config, grpo.train_batch_size, grpo.group_size)
    each = len(batch) // grpo.ticks_per_step
    minis = [batch.take(i * each, (i + 1) * each) for i in range(grpo.ticks_per_step)]
    found = shares(minis, swarm.dp, swarm.pp)
    return [Sizes(share.frame.nbytes, share.dense) for share in found for _ in range(share.ranks)]


def _made_up(config: RunConfig, prompts: int, samples: int) -> Batch:
    vocab, with_ref = parameters(config).vocab, bool(config.grpo.kl_loss_coef)
    return _samples(prompts, samples, prompt_tokens(config), response_tokens(config), vocab, with_ref)


@cache
def _samples(prompts: int, samples: int, prompt: float, response: float, vocab: int, with_ref: bool) -> Batch:
    rng = np.random.default_rng(0)
    shared = np.split(rng.integers(0, vocab, round(prompts * prompt)), np.cumsum(_lengths(prompts, prompt))[:-1])
    lengths = _lengths(prompts * samples, response, spread=0.5)
    own = [rng.integers(0, vocab, length) for length in lengths.tolist()]
    rewards = rng.integers(0, 2, (prompts, samples)).astype(np.float32)
    scale = rewards.std(1, keepdims=True, ddof=1) if samples > 1 else np.ones((prompts, 1), np.float32)
    logprobs = -np.exp2(rng.uniform(-EXPONENTS + 3, 3, int(lengths.sum()))).astype(np.float32)
    heads = np.repeat([len(tokens) for tokens in shared], samples).astype(np.int32)
    return Batch(
        tokens=np.concatenate([p for i, o in enumerate(own) for p in (shared[i // samples], o)]).astype(np.int32),
        prompt=heads,
        total=(heads + lengths).astype(np.int32),
        rollout_logprobs=logprobs,
        ref_logprobs=logprobs if with_ref else logprobs[:0],
        rewards=rewards.reshape(-1),
        advantages=((rewards - rewards.mean(1, keepdims=True)) / (scale + 1e-6)).astype(np.float32).reshape(-1),
        truncated=np.zeros(prompts * samples, bool),
    )


def _lengths(count: int, mean: float, spread: float = 0.0) -> np.ndarray:
    """Whole numbers that come to round(count * mean), from (1 - spread) to (1 + spread) times the mean."""
    share = 1 + spread * np.linspace(-1, 1, count)[np.random.default_rng(count).permutation(count)]
    ends = np.round(np.cumsum(share / share.sum()) * round(count * mean)).astype(np.int64)
    return np.diff(ends, prepend=0)
