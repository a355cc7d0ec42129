"""The runs of a sweep: every cell and seed with its checked config, its folder, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deploy.config import ConfigError, load
from deploy.resume import read_summary
from deploy.unread import unread, within
from experiments.sweep import Job, Sweep, SweepError, flat
from swarm.run_config import RunConfig


@dataclass
class SweepRun:
    """One run of a sweep and how far it is."""

    job: Job
    config: RunConfig
    folder: Path
    state: str  # completed (before), waiting, starting, running, then the status of its summary
    error: str | None = None

    @property
    def label(self) -> str:
        return f"{self.job.name}, seed {self.job.seed}"


def planned_runs(sweep: Sweep, out: Path, overrides: list[str], jobs: list[Job] | None = None) -> list[SweepRun]:
    """`jobs` (default: `sweep.jobs()`), each config checked and each folder looked at. Raises SweepError.

    `overrides` (as of --set) are laid over the base, below what a cell sets. A setting of a cell that its run does not
    read is refused, one of `overrides` or of the grid if no cell reads it.
    """
    _check_some_cell_reads(sweep, overrides)
    found = []
    for job in sweep.jobs() if jobs is None else jobs:
        config = _config(sweep, overrides, job)
        folder = out / job.folder
        found.append(SweepRun(job, config, folder, "completed" if _finished(folder, config) else "waiting"))
    return found


def _config(sweep: Sweep, overrides: list[str], job: Job) -> RunConfig:
    try:
        return load(sweep.base, overrides, job.tables(), given=flat(job.changes))
    except (ConfigError, ValueError) as error:
        raise SweepError(f"cell {job.name}, seed {job.seed}: {error}") from None


def _check_some_cell_reads(sweep: Sweep, overrides: list[str]) -> None:
    """Of what all cells are given: an arm without a merger has no use for a dose, but some arm must have."""
    cells = {job.cell: _config(sweep, overrides, job) for job in sweep.jobs()}.values()
    dead = set.intersection(*(unread(flat(config.model_dump(mode="json"))) for config in cells))
    for key in [*(override.partition("=")[0].strip() for override in overrides), *sweep.axes]:
        if any(within(key, table) for table in dead):
            raise SweepError(f"{key} is read by no cell of {sweep.name}: leave it out, or add a cell that reads it")


def _finished(folder: Path, config: RunConfig) -> bool:
    """Whether the folder holds this very run, completed. Raises SweepError if it holds another one."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        there = load(str(folder / "config.toml"), given=())
    except ConfigError as error:
        raise SweepError(f"{folder} holds no run of this sweep ({error}): move it, or choose another --out") from None
    if there != config:
        old, new = flat(there.model_dump(mode="json")), flat(config.model_dump(mode="json"))
        keys = [f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        raise SweepError(
            f"{folder} holds a run of another config ({'; '.join(keys)}): move it, or choose another --out"
        )
    return read_summary(folder).get("status") == "completed"


def check_runs(runs: list[SweepRun]) -> None:
    """`preflight` of what is to be run, once for all runs that it sees alike. Raises SweepError."""
    from deploy.preflight import preflight  # with torch, which takes seconds: a sweep that is wrong is refused before

    seen = set()
    for run in runs:
        config = run.config
        sections = config.model, config.task, config.grpo, config.rollout, config.val, config.swarm, config.codec
        sections += (config.merger,)
        alike = str([section.model_dump(mode="json") for section in sections])
        if run.state == "completed" or alike in seen:
            continue
        seen.add(alike)
        try:
            preflight(config)
        except ValueError as error:
            raise SweepError(f"cell {run.label}: {error}") from None
