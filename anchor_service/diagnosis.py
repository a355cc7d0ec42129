"""What a correction is worth: the tick's gradients beside the true one, by cosine, sign and error.

Tick T took θ_{T-1} to θ_T on b_T. With ∇L(θ; b) the dense gradient as the anchor computes it:

    g = ∇L(θ_{T-1}; b_T)    what the tick would have used without codec and merger
    M_s = ∇L(θ_s; b_{s+1})  what the anchor sent;   M_d = ∇L(θ_s; b_T)  the same weights on this tick's batch

    g - M_s = (g - M_d) + (M_d - M_s)      weight drift, then the shift of the samples from b_{s+1} to b_T

The shift holds sampling noise: two batches of one distribution differ too. With the halves g = g_A + g_B of b_T,
‖g_A - g_B‖² estimates E‖g - E g‖², and two independent batches differ by √2 times its root: `error_noise`.
With `anchor.replay = "window"` M_s is of what the anchor replayed, samples of several mini-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anchor_service.dense_gradient import DenseGradient, DenseSetup
from anchor_service.messages import unpack_records
from anchor_service.replay import unpack_replay
from rl.batch import Batch
from rl.config import GrpoConfig
from rl.device import peak_memory_gb

BLOCK = 1 << 20  # elements: sums in float64 without a float64 copy of a vector

Found = dict[str, float | None]  # None: not defined, because a vector is 0


def total(term: Callable[..., Tensor], *vectors: Tensor) -> float:
    """Sum of `term` over the coordinates of fp32 vectors [n], in float64."""
    blocks = zip(*(vector.split(BLOCK) for vector in vectors))
    return sum(term(*(block.double() for block in each)).sum().item() for each in blocks)


def dot(a: Tensor, b: Tensor) -> float:
    return total(torch.mul, a, b)


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖, from the differences, so that it is 0 for equal vectors."""
    return math.sqrt(total(lambda x, y: (x - y).square(), a, b))


def cosine(a: Tensor, b: Tensor) -> float | None:
    size = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / size if size else None


def sign_agreement(x: Tensor, g: Tensor) -> float | None:
    """Share of the coordinates where g is not 0 in which x has its sign; a 0 in x does not agree."""
    signed = total(lambda b: b != 0, g)
    return total(lambda a, b: a * b > 0, x, g) / signed if signed else None


def compare(name: str, x: Tensor, g: Tensor) -> Found:
    return {f"cos_{name}": cosine(x, g), f"sign_{name}": sign_agreement(x, g)}


def staleness(g: Tensor, drifted: Tensor, source: Tensor) -> Found:
    """g, M_d, M_s -> how far apart they are; errors relative to ‖g‖."""
    size = math.sqrt(dot(g, g))
    pairs = {"total": (g, source), "drift": (g, drifted), "shift": (drifted, source)}
    found: Found = {f"error_{name}": distance(*pair) / size if size else None for name, pair in pairs.items()}
    names = {"total": "cos_source", "drift": "cos_drift", "shift": "cos_shift"}
    return found | {names[name]: cosine(*pair) for name, pair in pairs.items()}


def noise(g: Tensor, half: Tensor) -> Found:
    """g and g_A -> `error_noise` = √2·‖g_A - g_B‖/‖g‖ and the cosine of the halves."""
    other, size = g - half, math.sqrt(dot(g, g))
    return {
        "error_noise": math.sqrt(2) * distance(half, other) / size if size else None,
        "cos_halves": cosine(half, other),
    }


def effect(name: str, direction: Tensor, reward: Tensor, length: Tensor) -> Found:
    """Cosines of a direction in weight space with the gradients of mean reward and of mean length."""
    return {f"cos_{name}_reward": cosine(direction, reward), f"cos_{name}_length": cosine(direction, length)}


def unclipped(grpo: GrpoConfig) -> GrpoConfig:
    """The bare policy gradient: no clip, a ratio a token, no KL, no entropy bonus."""
    off = {"clip_ratio": math.inf, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": None}
    off |= {"importance_sampling_level": "token", "kl_loss_coef": 0.0, "entropy_coeff": 0.0}
    return grpo.model_copy(update=off)  # unchecked: a file must not ask for an infinite clip


def leave_one_out(values: np.ndarray, group_size: int) -> np.ndarray:
    """Each value [N] less the mean of the *others* in its group of `group_size` consecutive samples, fp32.

    That is G/(G-1) times the value less its group's mean, and keeps the score-function gradient unbiased
    (Kool et al. 2019, "Buy 4 REINFORCE samples").
    """
    groups = values.astype(np.float64).reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdims=True)
    return (centred * group_size / (group_size - 1)).astype(np.float32).reshape(-1)


class Diagnoser:
    """The whole model beside a run. Keeps nothing between two diagnoses."""

    def __init__(self, setup: DenseSetup):
        torch.set_num_threads(setup.threads)
        self.dense = DenseGradient.beside(setup)
        self.grpo = setup.grpo

    def diagnose(
        self,
        tick: int,
        replay: np.ndarray,
        source_tick: int | None,
        m_bar: np.ndarray | None,
        source_replay: np.ndarray | None,
        *records: np.ndarray,
    ) -> dict[str, float]:
        """Metrics of one tick. `replay` and `source_replay` are the frames of b_T and b_{s+1} (or a window); `m_bar` fp32 [numel].

        `records` are those of the tick, one a stage, then those of θ_s if there is a source. A metric that is not
        defined is left out; all are, of a tick whose records have nothing of it but the weights after it. Raises FrameError.
        """
        moved = sum(x.nbytes for x in (replay, source_replay, m_bar, *records) if x is not None)
        stages, numel = len(self.dense.stages), self.dense.model.weights.numel
        vectors = unpack_records(records[:stages], tick, numel)
        if "before" not in vectors:  # who kept that was lost as the tick was over
            return {"perf/max_memory_gb": peak_memory_gb(self.dense.device)}
        if m_bar is not None:
            vectors["m_bar"] = torch.from_numpy(m_bar.copy())
        denominator, batch = _batch(replay, tick)
        g = self.gradient(vectors["before"], batch, denominator)
        found = compare("g_comp", vectors["g_comp"], g) | self._noise(g, vectors["before"], batch, denominator)
        if "m_bar" in vectors:
            found |= compare("m_bar", vectors["m_bar"], g)
        if "merged" in vectors:
            found["cos_merged"] = cosine(vectors["merged"], g)
        found |= self._effects(vectors, batch)
        if source_tick is not None and source_replay is not None:
            weights = unpack_records(records[stages:], source_tick, numel)["after"]
            drifted = self.gradient(weights, batch, denominator)
            its_denominator, its_batch = _batch(source_replay, source_tick + 1)
            found |= staleness(g, drifted, self.gradient(weights, its_batch, its_denominator))
        found["bytes"] = moved
        metrics = {f"diagnostics/{name}": value for name, value in found.items() if value is not None}
        return metrics | {"perf/max_memory_gb": peak_memory_gb(self.dense.device)}

    def gradient(
        self, weights: Tensor, batch: Batch, denominator: float | np.ndarray, grpo: GrpoConfig | None = None
    ) -> Tensor:
        """∇L(weights; batch) as the anchor computes it, fp32 [numel] on the host."""
        own = self.dense.model.weights
        own.master.copy_(weights)
        own.publish()
        return self.dense.gradient(batch, denominator, grpo).to("cpu", copy=True)

    def ascent(self, weights: Tensor, batch: Batch, values: np.ndarray) -> Tensor:
        """Gradient of the mean of `values`, one a sample, over what the policy samples for the batch's prompts.

        The score function times the value less the mean of the others in the group, with the per-token ratio to
        the engine's log-probs, unclipped, summed over tokens, divided by the number of samples.
        """
        advantages = leave_one_out(values, self.grpo.group_size)
        scored = replace(batch, advantages=advantages, loss_weights=batch.loss_weights[:0])
        return self.gradient(weights, scored, len(batch), unclipped(self.grpo)).neg_()

    def _noise(self, g: Tensor, weights: Tensor, batch: Batch, denominator: float | np.ndarray) -> Found:
        """Halves by whole groups; nothing can be said of a batch of one group."""
        groups = len(batch) // self.grpo.group_size
        if groups < 2:
            return {}
        first = batch.take(0, groups // 2 * self.grpo.group_size)
        return noise(g, self.gradient(weights, first, denominator))

    def _effects(self, vectors: dict[str, Tensor], batch: Batch) -> Found:
        """What the update does to reward and to length, and what the gradients alone would."""
        reward = self.ascent(vectors["before"], batch, batch.rewards)
        length = self.ascent(vectors["before"], batch, batch.own_lengths)
        update = vectors["after"] - vectors["before"]
        found = effect("update", update, reward, length)
        found |= {"gain_reward": dot(update, reward), "gain_length": dot(update, length)}
        for name in ("g_comp", "merged"):
            if name in vectors:
                found |= effect(name, -vectors[name], reward, length)
        return found


def _batch(frame: np.ndarray, tick: int) -> tuple[float | np.ndarray, Batch]:
    batch, denominator = unpack_replay(frame, f"the mini-batch of tick {tick}")
    return denominator, batch
