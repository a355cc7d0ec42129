"""The runs of a sweep: every cell and seed with its checked config, its folder, and how far it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deploy.config import ConfigError, RunConfig, load
from deploy.preflight import preflight
from experiments.sweep import Job, Sweep, SweepError, flat


@dataclass
class Planned:
    """One run of a sweep and how far it is."""

    job: Job
    config: RunConfig
    folder: Path
    state: str  # completed (before), waiting, starting, running, then the status of its summary
    error: str | None = None

    @property
    def label(self) -> str:
        return f"{self.job.name}, seed {self.job.seed}"


def plan(sweep: Sweep, out: Path, overrides: list[str], jobs: list[Job] | None = None) -> list[Planned]:
    """`jobs` (default: `sweep.jobs()`), each config checked and each folder looked at. Raises SweepError.

    `overrides` (as of --set) are laid over the base, below what a cell sets.
    """
    found = []
    for job in sweep.jobs() if jobs is None else jobs:
        try:
            config = load(sweep.base, overrides, job.tables())
        except (ConfigError, ValueError) as error:
            raise SweepError(f"cell {job.name}, seed {job.seed}: {error}") from None
        folder = out / job.folder
        found.append(Planned(job, config, folder, "completed" if _finished(folder, config) else "waiting"))
    return found


def _finished(folder: Path, config: RunConfig) -> bool:
    """Whether the folder holds this very run, completed. Raises SweepError if it holds another one."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        there = load(str(folder / "config.toml"))
    except ConfigError as error:
        raise SweepError(f"{folder} holds no run of this sweep ({error}): move it, or choose another --out") from None
    if there != config:
        old, new = flat(there.model_dump(mode="json")), flat(config.model_dump(mode="json"))
        keys = [f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        raise SweepError(
            f"{folder} holds a run of another config ({'; '.join(keys)}): move it, or choose another --out"
        )
    try:
        return json.loads((folder / "summary.json").read_text())["status"] == "completed"
    except (OSError, ValueError, KeyError):
        return False


def check(runs: list[Planned]) -> None:
    """`preflight` of what is to be run, once for all runs that it sees alike. Raises SweepError."""
    seen = set()
    for run in runs:
        config = run.config
        sections = config.model, config.task, config.grpo, config.rollout, config.val, config.swarm, config.codec
        alike = str([section.model_dump(mode="json") for section in sections])
        if run.state == "completed" or alike in seen:
            continue
        seen.add(alike)
        try:
            preflight(config)
        except ValueError as error:
            raise SweepError(f"cell {run.label}: {error}") from None
