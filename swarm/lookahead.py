"""Samples that are asked for and not used yet: engines take them while the swarm trains (s: `rollout.max_staleness`).

    engines   load W0 │ gen 1 … gen 1+s │ load W1 │ gen 2+s │ load W2 │ gen 3+s │ …
    swarm     wait for gen 1 │ ticks of step 1, send W1 │ wait for gen 2 │ ticks of step 2, send W2 │ …

An engine works through its queue in order, so the weights that sample a step follow from its number alone. What is
waited for is always the head of the queue: its deadline is that of one batch, whatever stands behind it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anchor_service.calls import Calls
from rl.batch import Prompts
from rl.config import RolloutConfig
from swarm import checkpoint

Result = tuple[
    np.ndarray, float, dict[str, float]
]  # of some prompts: batch frame, peak memory in GB, sums (`generate`)


@dataclass(eq=False)
class Sent:
    """Weights after `step` steps, on their way to all engines."""

    step: int
    tick: int
    calls: Calls  # each delivers the digest of what its engine then holds
    digest: str = ""  # of what all of them hold; empty until they have said so
    references: list[object] = field(default_factory=list)  # to their frames, one a stage
    since: float = field(default_factory=time.monotonic)  # when they were sent, on the monotonic clock
    whole: bool = False  # a frame of them is, in a stream of deltas: nothing leads back over it
    kind: str = "load"  # what takes as long as this


@dataclass(eq=False)
class Asked:
    """The samples of one step: prompts in order, dealt over the engines."""

    step: int
    weights: Sent  # the last ones before it in every queue
    calls: Calls
    prompts: list[Prompts] = field(default_factory=list)  # of each call
    results: list[Result] | None = None  # once they are here
    since: float = field(default_factory=time.monotonic)  # when they were asked for, on the monotonic clock

    @property
    def staleness(self) -> int:
        """Steps between the weights that sample it and those that it trains."""
        return self.step - 1 - self.weights.step


class Lookahead:
    """The steps that are asked for and not used, oldest first, without a gap. Those that are here come first."""

    def __init__(self, rollout: RolloutConfig, steps: int):
        self.rollout, self.steps = rollout, steps
        self.asked: list[Asked] = []

    def missing(self, step: int) -> range:
        """The steps to ask for when `step` begins: up to s beyond it, none beyond the run's last."""
        first = self.asked[-1].step + 1 if self.asked else step
        return range(first, self.rollout.ahead_of(step, self.steps) + 1)

    def save(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """For a checkpoint, once nothing is in flight: plain numbers, and frames."""
        found: list[dict[str, Any]] = []
        frames: dict[str, np.ndarray] = {}
        for asked in self.asked:
            results, weights = asked.results or [], asked.weights
            frames |= {_name(asked.step, i): frame for i, (frame, *_) in enumerate(results)}
            measured = [[peak, sums] for _, peak, sums in results]
            by = {"step": weights.step, "tick": weights.tick, "digest": weights.digest}
            found.append({"step": asked.step, "weights": by, "measured": measured})
        return {"samples": found}, frames

    def restore(self, folder: Path, state: dict[str, Any]) -> int:
        """Take up what a checkpoint of state["step"] holds. Returns how many steps it should hold more.

        Raises CheckpointError if a frame is missing.
        """
        for saved in state.get("samples", []):
            if saved["step"] <= self.steps:
                by, step = saved["weights"], saved["step"]
                frames = [checkpoint.frame_of(folder, _name(step, i)) for i in range(len(saved["measured"]))]
                results: list[Result] = [(f, peak, sums) for f, (peak, sums) in zip(frames, saved["measured"])]
                self.asked.append(Asked(step, Sent(by["step"], by["tick"], [], by["digest"]), [], results=results))
        return self.rollout.ahead_of(state["step"], self.steps) - state["step"] - len(self.asked)


def _name(step: int, part: int) -> str:
    return f"samples-{step}-{part}"
