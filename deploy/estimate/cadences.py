"""How often an anchor can answer at its delay: the workers that a cadence takes, its bytes, and the best of a budget.

    workers   the fewest that keep it up for ever, each free again when its turn comes
    bytes     snapshot + replay + correction of a mean tick; M̄ handed on among several workers comes on top

The recommended pair (cadence, replay) is the smallest cadence that the configured workers keep and the budget pays
for, and a window wherever there is more than one tick in it: as many samples, of more prompts.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Literal

from anchor_service.config import FixedLag
from codec.costs import FP32
from deploy.estimate.bytes import anchor_channels
from deploy.estimate.parameters import parameters
from deploy.estimate.phases import Phases, sustainable_cadence
from deploy.estimate.workload import expected_fires
from merger import merger_class
from swarm.run_config import RunConfig

ASKED = (1, 2)
KNOWN = 1.02  # bytes are estimated within this factor: a budget is not exceeded by less


@dataclass(frozen=True)
class Cadence:
    """What it takes to answer every `cadence` ticks at the configured delay."""

    cadence: int
    replay: Literal["tick", "window"]
    workers: int | None  # None: no number of them, as M̄ takes longer than that from one to the next
    bytes: float  # of snapshot, replay and correction, a tick
    m_bar_bytes: float  # handed on among the workers, a tick


@dataclass(frozen=True)
class Affordable:
    """Cadences 1 and 2, and the best one within `budget` bytes a tick for the configured workers."""

    asked: list[Cadence]
    budget: float
    best: Cadence


def affordable(config: RunConfig, tick_s: float, sustainable: int, budget: float) -> Affordable:
    """`tick_s`: seconds from tick to tick; `sustainable`: the smallest cadence that the configured workers keep."""
    each = config.grpo.ticks_per_step if config.anchor.weights == "shared" else 1  # snapshots at the end of a step
    steps = range(-(-sustainable // each) * each, max(sustainable, config.ticks) + each, each)
    within = cache(lambda cadence: anchor_bytes(config, cadence) <= KNOWN * budget)
    top = 0
    while top < len(steps) - 1 and not within(steps[top]):  # few cadences are looked at, short ones first
        top = min(2 * top + 1, len(steps) - 1)
    best = steps[bisect_left(steps, True, hi=top, key=within)]
    asked = sorted({-(-cadence // each) * each for cadence in ASKED})
    return Affordable([_cadence(config, c, tick_s) for c in asked], budget, _cadence(config, best, tick_s))


def anchor_bytes(config: RunConfig, cadence: int, workers: int | None = None) -> float:
    """A tick, of snapshot, replay and correction. Weights move as in the config's own run: others are within 5 %."""
    ticks, sources = config.ticks, _sources(config, cadence)
    return sum(anchor_channels(_with(config, cadence, workers), ticks, sources, len(sources) / ticks).values())


def _cadence(config: RunConfig, cadence: int, tick_s: float) -> Cadence:
    workers = fewest_workers(config, cadence, tick_s)
    there = _with(config, cadence, workers).anchor
    fires = len(_sources(config, cadence)) / config.ticks
    m_bar = FP32 * parameters(config).total * fires if there.workers > 1 else 0.0
    return Cadence(cadence, there.replay, workers, anchor_bytes(config, cadence, workers), m_bar)


def fewest_workers(config: RunConfig, cadence: int, tick_s: float) -> int | None:
    """That keep `cadence` up; with more workers a fire takes longer, as M̄ is handed on and each is longer without weights."""
    workers = 1
    while True:
        fire = Phases(_with(config, cadence, workers)).fire_time(cadence)
        if sustainable_cadence(fire.total, fire.handover, tick_s, workers) <= cadence:
            return workers
        if fire.handover > cadence * tick_s:
            return None
        workers = max(workers + 1, ceil(fire.total / (tick_s * cadence) - 1e-9))


def _with(config: RunConfig, cadence: int, workers: int | None) -> RunConfig:
    """So many workers (None: the config's), and the replay that is recommended at that cadence."""
    single = cadence == 1 or merger_class(config.merger.kind).needs_source
    anchor = {"replay": "tick" if single else "window", "workers": workers or config.anchor.workers}
    return config.model_copy(update={"anchor": config.anchor.model_copy(update=anchor)})


def _sources(config: RunConfig, cadence: int) -> list[int]:
    """Of the fires at a fixed lag of the config's delay."""
    anchor = {"cadence": cadence, "clock": "lockstep", "lag": FixedLag()}
    fixed = config.model_copy(update={"anchor": config.anchor.model_copy(update=anchor)})
    return [due.source_tick for due in expected_fires(fixed, config.ticks)]
