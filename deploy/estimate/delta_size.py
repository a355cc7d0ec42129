"""What weights cost on their way: a sample of the model's own, walked through the run's ticks and encoded.

    sample ─▶ tick 1 … T: noise for a gradient, merged, Adam ─▶ codec.delta between any two

A mini-batch's GRPO gradient is mostly noise (cosine 0.01 to 0.07 with the next one's), so here it is nothing
else: normal numbers, new in every tick, of a scale that Adam does not see. What is left to shape a delta is
the config's: learning rate, Adam's warm-up, a sign of M̄ held for a cadence, and the bits of the weights.
Over whole runs that comes within 1.6 % of the ledger in fp32, within 3 %, once 8 %, in bf16 (docs/results).

One thing Adam does see: in a head over V tokens, the row of a token that nobody expects has a gradient below
its eps, and hardly moves. A row's gradient is taken to go with its token's probability: 1/V, log-normally
spread, to the power of 1/temperature. A row of an untied embedding moves once its token has occurred.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from math import log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from anchor_service.lag import Due
from codec import delta
from codec.bf16 import from_bf16, to_bf16
from deploy.estimate.parameters import Params
from deploy.estimate.sample import Sample, sample_weights
from merger import MERGERS, make_merger
from merger.config import MergerConfig
from rl.config import GrpoConfig

PIECES, PIECE = 128, 512  # what walks: short pieces of every part, so that it is as mixed as the model
LONGEST, SETTLED = 96, 40  # ticks of a walk; later ones are like its last SETTLED
SPREAD = 2.5  # standard deviation of the logarithm of a token's probability (SmolLM2 on two tasks: 2.1 and 2.9)
CHUNK = 64  # neighbours that are taken to share a token
EPS = 1e-8  # Adam's, torch's default


@dataclass(frozen=True)
class Course:
    """Everything that a walk depends on."""

    path: str
    params: Params
    grpo: GrpoConfig
    merger: MergerConfig
    beta_anc: float
    max_age: int | None
    fires: tuple[Due, ...]
    temperature: float
    tokens: float  # that pass through the model in a tick
    blank: float  # share of ticks in which no sample has an advantage, and so no weight a gradient
    bf16: bool  # how weights travel
    ticks: int


@lru_cache(maxsize=2)
def walk(course: Course) -> Walk:
    return Walk(course)


class Walk:
    """A sample's weights after every tick, and what the model's cost to send. Sizes are in bytes a weight."""

    def __init__(self, course: Course):
        self.course = course
        part = sample_weights(course.path, course.params, PIECES, PIECE)
        self.own = part.own  # whether these are the model's weights
        walked = _adam(course.grpo, part.weights, _gradients(course, Noise(course, part)))
        self.weights = np.stack([part.weights, *walked])
        self.delta = cache(self._delta)
        self.coded = cache(self._coded)  # see there

    def between(self, source: int, target: int) -> float:
        """Of the weights after `target` ticks for someone who has those after `source` ticks."""
        if source == target:
            return 0.0
        last = len(self.weights) - 1
        if target > last:
            window = min(SETTLED, last)
            folded = last - (target - last - 1) % window
            source, target = max(0, folded - (target - source)), folded
        return self.delta(source, target)

    def _delta(self, source: int, target: int) -> float:
        return _size(self.weights[target], self.weights[source], self.course.bf16)

    def _coded(self, rate: float, sent: tuple[int, ...], exact: frozenset[int]) -> list[float]:
        """Of each frame of a stream at a `rate`, after the ticks `sent`; after those of `exact`, or if smaller, a lossless one.

        By the run's own coder. A frame beyond the walk costs what the last of its kind did.
        """
        import torch

        from codec.vector import EntropyVector

        coder, held, sizes = EntropyVector(16 * rate), self._travelled(0), dict[bool, float]()
        walked = [tick for tick in sent if tick < len(self.weights)]
        found = []
        for tick in walked:
            new = self.weights[tick]
            sizes[True] = _size(new, held, self.course.bf16)
            if tick in exact or sizes[True] <= 2 * rate:
                held, sizes[tick in exact] = self._travelled(tick), sizes[True]
            else:
                payload, decoded = coder.encode(torch.from_numpy(new - held))
                held, sizes[False] = held + decoded.numpy(), payload.numel() / len(new)
            found.append(sizes[tick in exact] if tick else 0.0)
        return found + [sizes[tick in exact] for tick in sent[len(walked) :]]

    def _travelled(self, tick: int) -> np.ndarray:
        """What a receiver of exact weights holds after `tick` ticks, fp32."""
        weights = self.weights[tick]
        return from_bf16(to_bf16(weights)) if self.course.bf16 else weights


def _size(new: np.ndarray, base: np.ndarray, bf16: bool) -> float:
    """Bytes a weight of an exact delta, encoded as `rl.snapshot` does."""
    if bf16:
        new, base = to_bf16(new), to_bf16(base)
    return sum(array.nbytes for array in delta.encode(new, base).values()) / len(new)


class Noise:
    """Gradients with nothing in them but each weight's own scale."""

    def __init__(self, course: Course, part: Sample):
        n = len(part.weights)
        self.rng = np.random.default_rng(0)
        likely = -log(course.params.vocab) + SPREAD * _normal(n, self.rng)  # log-probability of a weight's token
        scale = np.where(part.head, np.exp(np.minimum(0, likely / course.temperature)), 1.0)
        self.scale = (course.grpo.grad_clip / sqrt(course.params.total) * scale).astype(np.float32)
        self.looked_up = np.flatnonzero(part.table & ~part.head)  # an untied embedding
        occurrences = course.tokens * np.exp(likely[self.looked_up] - SPREAD**2 / 2)
        self.missing = np.exp(-occurrences)  # chance that a tick has none

    def draw(self, blank: bool) -> np.ndarray:
        """Of one mini-batch, fp32 [n]."""
        if blank:
            return np.zeros_like(self.scale)
        g = self.rng.standard_normal(len(self.scale), np.float32) * self.scale
        g[self.looked_up[self.rng.random(len(self.missing)) < self.missing]] = 0
        return g


def _normal(n: int, rng: np.random.Generator) -> np.ndarray:
    """Standard normal [n] in runs of CHUNK; the quantiles themselves in random order, so that few are enough."""
    count = -(-n // CHUNK)
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    return np.repeat(rng.permutation(quantiles), CHUNK)[:n]


class Merging:
    """The run's own merger, on arrays: ours take them as they are, anybody else's gets the tensors of a run."""

    def __init__(self, config: MergerConfig):
        self.merger, self.ours = make_merger(config), config.kind in MERGERS

    def held(self, m_bar: np.ndarray, source: np.ndarray) -> np.ndarray:
        """What a rank holds of M̄ and G_comp of the source tick."""
        if self.merger.needs_source:
            return m_bar - source
        return np.sign(m_bar).astype(np.int8) if self.merger.payload == "sign" else m_bar

    def __call__(self, g_comp: np.ndarray, correction: np.ndarray, age: int) -> np.ndarray:
        merge: Any = self.merger
        if self.ours:
            return merge(g_comp, correction, age, np.linalg.norm)
        import torch

        return merge(torch.from_numpy(g_comp), torch.from_numpy(correction), age).numpy()


def _gradients(course: Course, noise: Noise) -> Iterator[np.ndarray]:
    """What Adam is given, tick by tick, fp32 [n]: noise, merged with noise."""
    ticks, beta, merging = min(course.ticks, LONGEST), course.beta_anc, Merging(course.merger)
    blank = np.diff(np.floor(course.blank * np.arange(-1, ticks + 1))) > 0  # by tick, evenly spread
    sources = {due.first_tick: due.source_tick for due in course.fires}
    compressed: dict[int, np.ndarray] = {}  # of the ticks that a fire starts from
    m_bar = held = None
    since = 0
    for tick in range(1, ticks + 1):
        g = noise.draw(blank[tick])
        if tick - 1 in sources.values():
            compressed[tick - 1] = g
        if tick in sources:
            m = noise.draw(blank[sources[tick] + 1])
            m_bar = m if m_bar is None else beta * m_bar + (1 - beta) * m
            held, since = merging.held(m_bar, compressed.pop(sources[tick])), tick
        if held is not None and (course.max_age is None or tick - since <= course.max_age):
            g = merging(g, held, tick - since)
        yield g


def _adam(grpo: GrpoConfig, weights: np.ndarray, gradients: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Weights after each tick, fp32 [n]: decoupled weight decay, Loshchilov and Hutter 2019, algorithm 2.

    NumPy's, as planning goes without torch; nowhere else is AdamW written down. A run trains with torch.optim.AdamW,
    and the tests hold this one to it.
    """
    m, v, (slow, slower) = np.zeros_like(weights), np.zeros_like(weights), grpo.betas
    for tick, g in enumerate(gradients, start=1):
        m += (1 - slow) * (g - m)
        v += (1 - slower) * (g * g - v)
        step = m / (1 - slow**tick) / (np.sqrt(v / (1 - slower**tick)) + EPS)
        weights = (1 - grpo.lr * grpo.weight_decay) * weights - grpo.lr * step
        yield weights
