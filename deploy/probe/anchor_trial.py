"""What corrections of an anchor would be worth: gradients of a few mini-batches, with and without the codec, at equal weights.

    answers ─▶ mini-batch b ─▶ whole model ────────────▶ M_b     at the coordinates at which a merger looks
                    ╰────────▶ model [boundary] model ─▶ G_b

    f     sign(M_b) · sign(G_b)
    a     sign(M_b) · sign(M_c), all pairs

Codecs are as they were calibrated; of gradients' own codec nothing is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codec.boundary import Boundary
from deploy.estimate.worth import Measured
from merger.calibrated import Agreements, sign_products
from merger.look import looked_at, stride_of
from rl.aggregation import weighted
from rl.batch import Batch
from rl.objective import loss_terms, microbatches
from rl.policy import Stage
from rl.spans import Span
from swarm.run_config import RunConfig

LEAST, ENOUGH, MOST = 3, 8, 32  # mini-batches: needed; made smaller than a run's for; looked at


def pieces_of(answers: Batch, config: RunConfig) -> list[Batch]:
    """Of whole groups, as large as the run's; smaller where there are so few answers that they would be less than ENOUGH."""
    each = config.grpo.group_size
    groups = len(answers) // each
    size = each * max(1, min(config.grpo.ppo_mini_batch_size, groups // ENOUGH))
    starts = range(0, len(answers) - size + 1, size)[:MOST]
    return [weighted(answers.take(start, start + size), config.grpo) for start in starts]


class Gradients:
    """Of the whole model, by one process, at the coordinates looked at."""

    def __init__(self, folder: Path, layers: int, config: RunConfig):
        self.config, self.device = config, torch.device(config.swarm.device)
        dtype, checkpointing = getattr(torch, config.model.dtype), config.swarm.activation_checkpointing
        whole, model = Span(0, layers, layers), config.model
        how = True, model.attention, checkpointing, model.lora
        self.model = Stage(folder, whole, dtype, self.device, *how)
        weights = self.model.weights
        sizes = [math.prod(shape) for shape in weights.shapes]
        self.at = torch.from_numpy(looked_at(sizes, stride_of(weights.numel))).to(self.device)
        self.grpo = config.grpo.model_copy(update={"kl_loss_coef": 0.0})  # 0 at the weights that the reference has

    def of(self, batch: Batch, boundaries: Mapping[int, Boundary]) -> Tensor:
        """fp32 [coordinates], on the host. Without `boundaries` the ratio is to the engine's log-probs, as the anchor's is."""
        weights, swarm = self.model.weights, self.config.swarm
        weights.grad.zero_()
        for boundary in boundaries.values():
            boundary.begin_tick()
        for micro in microbatches(batch, np.argsort(-batch.total, kind="stable"), swarm.micro_batch_size, self.device):
            cuts = {i: b.cut(micro.rows, observe=True) for i, b in boundaries.items()}
            hidden = self.model(micro.ids, micro.real, cuts)
            old = None if boundaries and self.grpo.old_logprobs != "rollout" else micro.rollout_logprobs
            of, temperature = batch.loss_tokens, self.config.rollout.temperature
            loss_terms(self.model, hidden, micro, old, of, self.grpo, temperature).loss.backward()
            weights.collect()
        for rate in (b.way(way).rate for b in boundaries.values() for way in ("fwd", "bwd")):
            if rate is not None:
                rate.steer(rate.spent())
        return weights.grad[self.at].cpu()


def agreements(compressed: Tensor, dense: Tensor) -> Agreements:
    """Of G and M [B, coordinates], each a fire whose M is compared with those of all other mini-batches."""
    count, found = len(dense), Agreements()
    signs, kept = dense.sign().char(), compressed.sign().char()
    all_signs = signs.sum(0, dtype=torch.int32)
    for b in range(count):
        own, n = sign_products(signs[b], kept[b])
        there = int(signs[b].count_nonzero())
        if n and there:
            found.compressed.add(own / n, n)
            found.anchor.add(int((signs[b] * (all_signs - signs[b])).sum()) / (there * (count - 1)), count - 1)
    return found


def measured(compressed: Tensor, dense: Tensor, samples: int) -> Measured | None:
    """Of mini-batches of `samples` answers; those without a gradient do not count. None if too few are left.

    Errors are by jackknife: two mini-batches are compared with many of the same others.
    """
    there = compressed.any(1) & dense.any(1)
    compressed, dense = compressed[there], dense[there]
    count, coordinates = dense.shape
    if count < LEAST:
        return None

    def numbers(kept: Tensor) -> np.ndarray:
        seen = agreements(compressed[kept], dense[kept])
        return np.array([seen.compressed.value, seen.anchor.value])

    f, a = numbers(torch.arange(count)).tolist()
    without = np.stack([numbers(torch.arange(count) != b) for b in range(count)])
    errors = np.sqrt((count - 1) * without.var(0)).tolist()
    return Measured(count, samples, coordinates, f, errors[0], a, errors[1])


def compare_batches(
    folder: Path,
    layers: int,
    config: RunConfig,
    boundaries: Mapping[int, Boundary],
    answers: Batch,
    say: Callable[[str], None],
) -> Measured | None:
    """Both gradients of every mini-batch of `answers`, through codecs that were calibrated."""
    batches = pieces_of(answers, config)
    if len(batches) < LEAST:
        return None
    gradients = Gradients(folder, layers, config)
    dense, compressed = (torch.stack([gradients.of(batch, cuts) for batch in batches]) for cuts in ({}, boundaries))
    found = measured(compressed, dense, len(batches[0]))
    say(f"compared gradients of {len(batches)} mini-batches of {len(batches[0])} answers, with and without the codec")
    return found
