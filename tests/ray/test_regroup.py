"""Workers die, and are more or fewer, in real processes: the others go on within the run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from deploy.cluster.kept_actors import new_actors
from deploy.cluster.launch import drive
from swarm import scale
from swarm.fleet import Fleet
from swarm.run_config import RunConfig
from tests.ray.conftest import of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

EXACT = ("swarm.dp=2", "swarm.pp=2", "codec.kind=powersgd", "codec.q_cadence=4", "grpo.old_logprobs=trainer")


def _with(config: RunConfig, run: Path, at: dict[int, Callable[[Fleet], None]]) -> dict[str, Any]:
    """A run on actors of its own; `at` a tick's end something happens to them."""
    held: list[Fleet] = []

    @contextmanager
    def actors(config: RunConfig) -> Iterator[Fleet]:
        with new_actors(config) as fleet:
            held.append(fleet)
            yield fleet

    def listen(record: dict[str, Any]) -> None:
        if record["kind"] == "tick" and record["tick"] in at:
            at.pop(record["tick"])(held[0])

    return drive(config, run, listen, actors=actors)


def _pid(handle: Any) -> int:
    return ray.get(handle.__ray_call__.remote(lambda worker: os.getpid()))


def _kill(rank: int, after_s: float) -> Callable[[Fleet], None]:
    def kill(fleet: Fleet) -> None:
        pid = _pid(fleet.workers[rank])
        threading.Timer(after_s, os.kill, (pid, signal.SIGKILL)).start()

    return kill


def _until_ready(fleet: Fleet) -> None:
    """A run of seconds would be over before they are there."""
    spares = [spare.handle for spare in fleet.mend.__self__.regroup.spares.held]
    ray.get([handle.__ray_ready__.remote() for handle in spares], timeout=120)


def test_workers_that_die_are_replaced_from_their_twins_and_the_run_ends_in_the_same_bits(tmp_path: Path):
    """One of the second replica, then one of the first, which has the store and the engines' stream, within a tick or between.

    A spare is there already, and takes the place of the first.
    """
    alone = run_kept(small(*EXACT), tmp_path / "alone")
    run, spare, then = tmp_path / "killed", list[int](), list[int]()

    def kill_with_a_spare(fleet: Fleet) -> None:
        _until_ready(fleet)
        spare.extend(_pid(each.handle) for each in fleet.mend.__self__.regroup.spares.held)
        _kill(3, 0.05)(fleet)

    def kill_another(fleet: Fleet) -> None:
        then.append(_pid(fleet.workers[3]))
        _kill(0, 0.0)(fleet)

    killed = _with(small(*EXACT, "faults.spares=1"), run, {2: kill_with_a_spare, 5: kill_another})
    assert killed["weights_digests"] == alone["weights_digests"] and spare == then
    events = [e for e in of_kind(run, "event") if e["event"] == "workers regrouped"]
    assert [e["renewed"] for e in events] == ["worker d1p1", "worker d0p0"] and all(e["exact"] for e in events)
    assert [r["tick"] for r in of_kind(run, "tick")] == list(range(1, 13))


def test_a_run_gets_more_replicas_and_fewer_while_it_goes_on(tmp_path: Path):
    """Losses as on a fixed grid."""
    plain = "codec.kind=none", "anchor.enabled=false", "merger.kind=none"
    config = small(*plain, "grpo.ppo_mini_batch_size=3", "grpo.train_batch_size=6")  # 12 samples a tick
    fixed = run_kept(config, tmp_path / "fixed")
    run = tmp_path / "scaled"
    asked = {2: lambda fleet: scale.ask_for(run, 3), 4: _until_ready, 8: lambda fleet: scale.ask_for(run, 2)}
    scaled = _with(config, run, asked)
    changes = [e["replicas"] for e in of_kind(run, "event") if e["event"] == "replicas changed"]
    assert changes == [3, 2] and scaled["status"] == fixed["status"] == "completed"
    pairs = zip(of_kind(tmp_path / "fixed", "tick"), of_kind(run, "tick"), strict=True)
    for one, other in pairs:
        assert other["actor/pg_loss"] == pytest.approx(one["actor/pg_loss"], abs=2e-4)
        assert other["actor/grad_norm"] == pytest.approx(one["actor/grad_norm"], rel=2e-3)


WALL = ("swarm.dp=2", "swarm.pp=2", "anchor.clock=wall", "codec.kind=transform", "codec.total_rate=0.3", "run.steps=8")
CODED = ("codec.gradient.kind=sparse", "codec.gradient.bits=1.0", "grpo.old_logprobs=rollout", "val.every=8")


def test_on_the_wall_clock_the_others_go_on_and_a_twin_s_state_will_do(tmp_path: Path):
    """What the lost replica owed and had learnt is gone, and said to be; corrections on their way come to the new one too."""
    run, config = tmp_path / "run", small(*WALL, *CODED, "faults.spare_s=0.01")
    summary = _with(config, run, {3: _kill(1, 0.05), 7: _until_ready, 11: _kill(2, 0.02)})
    assert summary["status"] == "completed"
    events = [e for e in of_kind(run, "event") if e["event"] in ("replica missing", "replicas changed")]
    assert [e["event"] for e in events[:3]] == ["replica missing", "replicas changed", "replica missing"]
    assert [e["replicas"] for e in events[:3]] == [1, 2, 1]
    ticks = of_kind(run, "tick")
    assert [r["tick"] for r in ticks] == list(range(1, 17)) and any("anchor/version" in r for r in ticks)
