"""One local Ray cluster for all tests of this folder; a helper that runs a config on it, on kept actors.

Starting the actors of a run takes about four seconds of a core, a run here about two: a test starts actors of its own
only where that is what it is about, or where its run fails. Where they are not forked it is five seconds an actor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from deploy.cluster.kept_actors import KeptActors
from deploy.cluster.launch import cluster, drive
from deploy.config import load
from deploy.resume import plan_resume
from rl.batch import Batch
from swarm.coordinator import Coordinator
from swarm.replay_choice import MiniFrame
from swarm.run_config import RunConfig

SIZES = (
    "run.steps=6",
    "grpo.train_batch_size=4",
    "grpo.ppo_mini_batch_size=2",
    "grpo.group_size=4",
    "rollout.batch_size=2",
    "rollout.replicas=1",
    "swarm.micro_batch_size=4",
    "val.size=8",
    "val.every=6",
)
SMALL = (*SIZES, "anchor.delay_k=3", "anchor.cadence=2")


LARGEST = "swarm.dp=2", "swarm.pp=2", "anchor.workers=2", "rollout.replicas=2", "diagnostics.every=1"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with cluster(small(*LARGEST), None, lanes=2):
        yield
        HELD.close()


def small(*overrides: str) -> RunConfig:
    """The preset k5 on a small scale: 6 steps of 2 ticks, an anchor at delay 3, cadence 2."""
    return load("k5", [*SMALL, *overrides], given=())  # as a preset of that scale: what is not read is dropped


HELD = KeptActors()  # `test_sweep.py` holds that kept actors give the same bits as new ones


def run_kept(config: RunConfig, folder: Path, resume: bool = False) -> dict[str, Any]:
    """The summary of a run, in lockstep on actors that earlier tests may have used."""
    goes_on = plan_resume(folder, config) if resume else None
    assert goes_on or not resume, "it is completed"
    if config.anchor.clock == "wall":
        return drive(config, folder, ignore, goes_on)
    if not HELD.group:
        with HELD.lent(small(*LARGEST)):  # so that no later run needs more
            pass
    return drive(config, folder, ignore, goes_on, actors=HELD.lent)


def as_if_killed(run: Path, step: int) -> None:
    """Before its checkpoint of `step`, and before it wrote a summary."""
    shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    (run / "summary.json").unlink()


def ignore(record: dict[str, Any]) -> None: ...


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in lines(run, "metrics.jsonl") if record["kind"] == kind]


def kill_engine_in(step: int, coordinator: Coordinator) -> None:
    """The first engine dies when the samples of that step are there, before its ticks."""
    mini_batches = coordinator._mini_batches

    def kill(batch: Batch) -> list[MiniFrame]:
        if coordinator.progress.step == step:
            ray.kill(coordinator.fleet.engines[0])
        return mini_batches(batch)

    coordinator._mini_batches = kill
