"""What a validation says: of the task's own problems, of further sets, and of the rows of each source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rl.passes import passes
from rl.problem_columns import metric_name
from rl.val_config import OWN, AskedSet

if TYPE_CHECKING:
    from rl.batch import Batch
    from swarm.run_config import RunConfig


@dataclass(frozen=True)
class Answered:
    """The answers to one set. `groups`: of each problem, where metrics are asked for by a column; else empty."""

    asked: AskedSet
    batch: Batch
    groups: tuple[str, ...] = ()

    @property
    def rewards(self) -> np.ndarray:
        """[problems, samples]"""
        return self.batch.rewards.reshape(-1, self.asked.samples)

    def by_group(self) -> dict[str, np.ndarray]:
        """The rewards of each group, the groups in the order of their names."""
        groups = np.array(self.groups)
        return {group: self.rewards[groups == group] for group in sorted(set(self.groups))}


def set_label(config: RunConfig, asked: AskedSet) -> str:
    """What metrics call a set: its name, and the task's own problems as the task."""
    return asked.name or metric_name(config.task.name)


def validation_metrics(config: RunConfig, answered: Mapping[str, Answered]) -> dict[str, float]:
    """By split. verl's names, but `pass@k`, which verl has not."""
    found: dict[str, float] = {}
    for split, one in answered.items():
        label, batch = set_label(config, one.asked), one.batch
        found |= _accuracy(label, one.rewards)
        for group, rewards in one.by_group().items():
            found |= _accuracy(f"{label}/{group}", rewards)
        aux = "val-aux" if split == OWN else f"val-aux/{label}"
        found[f"{aux}/response_length/mean"] = float(batch.own_lengths.mean())
        found[f"{aux}/response_length/clip_ratio"] = float(batch.truncated.mean())
    return found


def _accuracy(label: str, rewards: np.ndarray) -> dict[str, float]:
    core = f"val-core/{label}/acc"
    found = {f"{core}/mean@{rewards.shape[1]}": float(rewards.mean())}
    return found | {f"{core}/pass@{k}": share for k, share in passes(rewards).items()}


def accuracies(config: RunConfig, answered: Mapping[str, Answered]) -> dict[str, float]:
    """Mean rewards by label, of all that is validated on but of the task's own problems as a whole."""
    found: dict[str, float] = {}
    for split, one in answered.items():
        label = set_label(config, one.asked)
        found |= {} if split == OWN else {label: float(one.rewards.mean())}
        found |= {f"{label}/{group}": float(rewards.mean()) for group, rewards in one.by_group().items()}
    return found
