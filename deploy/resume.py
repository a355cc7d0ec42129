"""Where a stopped run goes on, from its folder alone: reads files, changes none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.config import ConfigError, load
from deploy.unread import unread, within
from experiments.sweep import flat
from swarm.manifest import CheckpointError
from swarm.run_config import RunConfig

_MAY_CHANGE = {  # where a run goes on: what decides where and how long it runs, not what it computes but for rounding
    "run.steps",
    "run.name",
    "run.loggers",
    "run.checkpoint_every",
    "val.every",
    "task.overlong",  # rows left out are compared beside the data: `rl.problems.check_same`
    "rollout.replicas",
    "rollout.gpu_memory",
    "rollout.kv_cache_gb",
    "anchor.workers",
    "anchor.slowdown",
    "swarm.dp",  # each replica has all that the ticks need; `checkpoint.restore_rank`
    "swarm.placement",
    "swarm.on_nan",
    "anchor.norm_bound",
    "swarm.activation_checkpointing",
}

_EXACT_AFTER = {"run.checkpoint_every", "val.every"}

_MAY_RISE = {"grpo.max_prompt_length", "grpo.max_response_length"}  # a run that met its limit can go on


@dataclass(frozen=True)
class Resume:
    """A checkpoint that is whole, and what is wrong with newer ones; None: stopped before its first one, begins anew."""

    checkpoint: Path | None
    damaged: tuple[str, ...] = ()


def plan_resume(run: Path, config: RunConfig, or_begin: bool = False) -> Resume | None:
    """None: the run has completed its `run.steps` already. `or_begin`: without checkpoints it begins anew.

    Raises ConfigError if `config` is another experiment, CheckpointError if there is nothing to go on from.
    """
    stored = run / "config.toml"
    if not stored.is_file():
        raise CheckpointError(f"{run} holds no run to go on with: it has no config.toml")
    check_resumes(stored, config)
    summary, steps = read_summary(run), config.run.steps
    if summary.get("status") == "completed" and summary.get("steps") == steps:
        return None
    from swarm import checkpoint  # with torch, which takes seconds

    if not (or_begin or config.run.checkpoint_every or checkpoint.all_of(run)):
        raise CheckpointError(f"{run} has no checkpoint: set run.checkpoint_every before the run starts")
    found = newest(run)
    step = checkpoint.read_state(found.checkpoint)["step"] if found.checkpoint else 0
    if step > steps:
        raise CheckpointError(
            f"{run} is at step {step} and run.steps is {steps}: nothing is left to do; "
            f"set run.steps to more than {step} to make it longer"
        )
    return found


def newest(run: Path) -> Resume:
    """The newest checkpoint that is whole. Raises CheckpointError if there are some, and none is."""
    from swarm import checkpoint

    if not checkpoint.all_of(run):
        return Resume(None)
    found, damaged = checkpoint.newest_good(run)
    return Resume(found, tuple(damaged))


def check_resumes(stored: Path, config: RunConfig) -> None:
    """Raises ConfigError if `config` is another experiment than the one of a run folder's config.toml."""
    before, after = (flat(c.model_dump(mode="json")) for c in (load(str(stored), given=()), config))
    other = {key for key in before | after if before.get(key) != after.get(key)} - _MAY_CHANGE
    dead = unread(before) | unread(after)  # what one of them does not read follows from another key, which is compared
    other -= {key for key in other for table in dead if within(key, table)}
    if config.snapshot.rate is not None:  # where engines get exact weights is part of what they sample
        other |= {key for key in _EXACT_AFTER if before[key] != after[key]}
    if config.grpo.lr_schedule.kind != "constant" and before["run.steps"] != after["run.steps"]:
        other.add("run.steps")  # the rate falls to the end of the run
    other = {
        key
        for key in other
        if not key.endswith(("timeout_s", ".resource")) and not key.startswith(("links.", "faults.", "samples."))
    }
    fixed = {"grpo.max_response_length"} if config.grpo.counts_longest else set[str]()
    other -= {key for key in _MAY_RISE - fixed if before[key] < after[key]}
    if other:
        changes = ", ".join(f"{key} {before.get(key)!r} -> {after.get(key)!r}" for key in sorted(other))
        changes += "".join(f"; {key} may only be raised" for key in sorted(other & (_MAY_RISE - fixed)))
        changes += "; grpo.lr_schedule falls over run.steps" if "run.steps" in other else ""
        raise ConfigError(f"--resume goes on with the experiment of {stored}, and this is another: {changes}")


def read_summary(run: Path) -> dict[str, Any]:
    """Empty if the run wrote none, or half of one."""
    try:
        return dict(json.loads((run / "summary.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}
