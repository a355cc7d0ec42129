"""A tick, a step and a fire by phase, over the config's `links` without jitter: what `plan` prints.

    tick    1F1B pipeline (compute, then what its links add) + reduce over replicas + tied + basis + agreements
    step    rollouts + dealing samples + old log-probs + its ticks + weights to the engines, less what overlaps
    fire    pull snapshot and replay + forward and backward + M̄ handed on + publish to every rank

Not counted: optimizer, merge, encoding, scoring, validation, and links that are shared at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from deploy.estimate.bytes import sync_bytes
from deploy.estimate.timing import Durations
from deploy.estimate.workload import fires_per_tick, forward_passes
from swarm.run_config import RunConfig


class _Total:
    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class TickTime(_Total):
    """Seconds of one tick by phase."""

    compute: float
    boundary: float  # what the links between stages add to the pipeline
    gradient_reduce: float
    tied: float
    basis: float
    agreements: float


@dataclass(frozen=True)
class StepTime(_Total):
    """Seconds of one global step by phase."""

    rollouts: float
    deal: float
    old_logprobs: float
    ticks: float
    sync: float
    overlap: float  # negative: what of rollouts and sync passes beside the rest, with `rollout.max_staleness`


@dataclass(frozen=True)
class FireTime(_Total):
    """Seconds of one fire, from the tick that starts it until every rank holds its correction."""

    pull: float
    compute: float
    handover: float  # of M̄, between anchor workers
    publish: float


class Phases(Durations):
    """The mean tick of a run, taken apart."""

    def __init__(self, config: RunConfig):
        links = config.links.model_copy(update={"jitter": 0.0})
        super().__init__(config.model_copy(update={"links": links}), np.random.default_rng(0))

    def tick_time(self, refreshes: float) -> TickTime:
        """`refreshes`: share of the ticks that refresh Q."""
        piped = self._pipeline(self.order, ways=2).max(axis=1)
        reduced = (piped + self._reduce(np.ones(self.pp))).max()
        work = self.tick(refresh=False)
        return TickTime(
            compute=self.bare_tick,
            boundary=float(piped.max()) - self.bare_tick,
            gradient_reduce=float(reduced - piped.max()),
            tied=float(work.before - reduced),
            basis=refreshes * (self.tick(refresh=True).before - work.before),
            agreements=work.after,
        )

    def step_time(self, tick: TickTime) -> StepTime:
        """Of a run under way. With samples s steps ahead the weights of a step come back as samples s+1 steps later,
        so in that time all phases pass once; and a step is no shorter than its swarm's part, its samples or its sync.
        """
        grpo = self.config.grpo
        rollouts = self.rollout(grpo.train_batch_size, grpo.group_size)
        sizes = sync_bytes(self.config, self.params, self.config.ticks)
        sync = self.weight_sync(float(np.mean(sizes[-(len(sizes) // 2) :])))
        passes = forward_passes(self.config, self.has_tables) - 1
        deal, old = self.deal(), grpo.ticks_per_step * passes * self.old_logprobs().before
        ticks = grpo.ticks_per_step * tick.total
        swarm, whole = deal + old + ticks, rollouts + deal + old + ticks + sync
        seconds = max(whole / (1 + self.config.rollout.max_staleness), swarm, rollouts, sync)
        return StepTime(rollouts, deal, old, ticks, sync, overlap=seconds - whole)

    def fire_time(self, every: float | None = None) -> FireTime:
        """One fire `every` so many ticks, by default the config's; `anchor.slowdown` stretches pull and compute."""
        anchor = self.config.anchor
        pull = self.pull(self.rng, anchor.workers * (every or 1 / (fires_per_tick(self.config) or 1)))
        slept = (anchor.slowdown - 1) * (pull + self.anchor_compute)
        return FireTime(pull, self.anchor_compute + slept, self.pass_m_bar(self.rng), self.deliver(self.rng))


def sustainable_cadence(fire: float, handover: float, tick: float, workers: int) -> int:
    """The smallest cadence, in ticks, that the anchor keeps up with for ever.

    Workers take turns, so each must be free again after `workers` fires; M̄ passes through all of them
    in the order of versions, so its hand-over alone must fit between two fires.
    """
    return max(1, _ceil(fire / (tick * workers)), _ceil(handover / tick))


def first_lag(fire: float, tick: float) -> int:
    """The smallest delay_k that waits for nothing.

    A fire from θ_s starts with tick s+1 and must be done when tick s+K starts: K-1 ticks.
    """
    return 1 + max(1, _ceil(fire / tick))


def _ceil(x: float) -> int:
    return ceil(x - 1e-9)
