"""Whole runs whose engines sample ahead: equal to the bit, stopped or not, and mended where an engine is killed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster.kept_actors import new_actors
from swarm.coordinator import Coordinator
from swarm.run_config import RunConfig
from swarm.telemetry import Telemetry
from tests.ray.conftest import as_if_killed, ignore, kill_engine_in, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def ahead(staleness: int, *overrides: str) -> RunConfig:
    return small(f"rollout.max_staleness={staleness}", "grpo.rollout_is=token", "val.every=3", *overrides)


def untimed(run: Path) -> list[dict[str, Any]]:
    """Ticks, steps and validations without what a clock or a memory says."""
    found = [record for kind in ("tick", "step", "val") for record in of_kind(run, kind)]
    measured = ("timing_s/", "perf/", "time")
    return [{k: v for k, v in record.items() if not k.startswith(measured)} for record in found]


def staleness_of(run: Path) -> list[int]:
    return [record["training/staleness"] for record in of_kind(run, "step")]


@pytest.fixture(scope="module")
def whole(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps at most two behind, with checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("ahead") / "whole"
    run_kept(ahead(2, "run.checkpoint_every=2"), run)
    return run


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_the_staleness_of_every_step_is_recorded(whole: Path):
    assert staleness_of(whole) == [0, 1, 2, 2, 2, 2]
    digests = [record["rollout/weights_digest"] for record in of_kind(whole, "step")]
    assert digests[0] == digests[1] == digests[2] and len(set(digests)) == 4  # of what sampled it


def test_two_runs_are_equal_to_the_bit_on_other_numbers_of_engines_and_a_slow_anchor(whole: Path, tmp_path: Path):
    again = run_kept(ahead(2, "rollout.replicas=2", "anchor.slowdown=5.0"), tmp_path / "again")
    assert again["weights_digests"] == summary(whole)["weights_digests"]
    assert again["validations"] == summary(whole)["validations"]
    assert lines(tmp_path / "again", "corrections.jsonl") == lines(whole, "corrections.jsonl")
    comm = lambda records: [{k: v for k, v in r.items() if not k.startswith("comm/")} for r in records]  # noqa: E731
    assert comm(untimed(tmp_path / "again")) == comm(untimed(whole))


def test_one_step_behind_is_another_run_that_repeats_too_and_none_behind_is_todays(whole: Path, tmp_path: Path):
    first, second = (run_kept(ahead(1), tmp_path / name) for name in ("first", "second"))
    assert untimed(tmp_path / "first") == untimed(tmp_path / "second")
    assert staleness_of(tmp_path / "first") == [0, 1, 1, 1, 1, 1]
    none = run_kept(ahead(0), tmp_path / "none")
    assert staleness_of(tmp_path / "none") == [0] * 6
    ends = [run["weights_digests"] for run in (first, second, none, summary(whole))]
    assert ends[0] == ends[1] and len({str(end) for end in ends}) == 3


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_stopped_with_samples_in_flight_goes_on_to_the_bit(whole: Path, tmp_path: Path, step: int):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    kept = {file.name for file in (run / "checkpoints").iterdir()}
    assert kept == {"step-000004", "step-000006"}  # the newest two
    if step == 2:
        shutil.rmtree(run)
        run_kept(ahead(2, "run.checkpoint_every=2", "run.steps=4"), run)
        as_if_killed(run, 4)
    else:
        as_if_killed(run, 6)
    frames = {file.name for file in (run / "checkpoints" / f"step-{step:06d}").glob("samples-*")}
    assert frames == {f"samples-{s}-{part}.frame" for s in (step + 1, step + 2) for part in (0, 1)}
    end = run_kept(ahead(2, "run.checkpoint_every=2"), run, resume=True)
    assert end["weights_digests"] == summary(whole)["weights_digests"]
    assert end["validations"] == summary(whole)["validations"]
    assert staleness_of(run) == [0, 1, 2, 2, 2, 2]
    for channel in ("control", "replay", "boundary_fwd"):
        assert end["bytes"][channel] == summary(whole)["bytes"][channel]


def hang_before_samples_of(step: int, coordinator: Coordinator) -> None:
    """The first engine does nothing more before it comes to that request: it has not delivered it when it is killed."""
    ask_for = coordinator.rollouts._ask_for

    def behind(asked: int) -> Any:
        if asked == step:
            coordinator.fleet.engines[0].__ray_call__.remote(lambda _: time.sleep(300))
        return ask_for(asked)

    coordinator.rollouts._ask_for = behind


def test_an_engine_that_is_killed_gives_the_same_samples_also_of_older_weights(whole: Path, tmp_path: Path):
    config, folder = ahead(2), tmp_path / "deadly"
    folder.mkdir()
    with new_actors(config) as actors:
        telemetry = Telemetry(folder, ignore)
        coordinator = Coordinator(config, actors, telemetry, folder)
        hang_before_samples_of(5, coordinator)  # asked for in step 3
        kill_engine_in(3, coordinator)
        coordinator.run()
        assert telemetry.digests == summary(whole)["weights_digests"]
        telemetry.finish("completed", {})
    (event,) = [e for e in of_kind(folder, "event") if e["event"] == "engine renewed"]
    assert event["asked_again"][0] in (4, 5)  # 4, unless it was delivered before
    assert staleness_of(folder) == staleness_of(whole)


def test_an_anchor_that_shares_the_stream_of_weights_has_them_in_time(whole: Path, tmp_path: Path):
    """In lockstep the fires are the same whatever the engines do; on the wall clock the run ends."""
    shared = "anchor.weights=shared", "anchor.delay_k=2"
    own, other = (
        run_kept(ahead(1, *sets), tmp_path / name) for name, sets in (("own", shared[1:]), ("shared", shared))
    )
    assert own["weights_digests"] == other["weights_digests"]
    assert lines(tmp_path / "own", "corrections.jsonl") == lines(tmp_path / "shared", "corrections.jsonl")
    wall = run_kept(ahead(2, *shared, "anchor.clock=wall"), tmp_path / "wall")
    assert wall["status"] == "completed" and staleness_of(tmp_path / "wall") == [0, 1, 2, 2, 2, 2]
