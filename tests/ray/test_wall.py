"""The wall clock with real actors: nothing waits for the anchor, every lag is recorded, a record can be replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from anchor_service.lag import Due
from deploy.cluster.kept_actors import new_actors
from swarm.coordinator import Coordinator
from swarm.replay_choice import MiniFrame
from swarm.telemetry import Telemetry
from tests.ray.conftest import as_if_killed, ignore, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

WALL = ("anchor.clock=wall", "run.steps=12", "val.every=12", "anchor.lag.kind=lognormal", "anchor.lag.mean=4")
HEADS = ("merger.kind=calibrated", "merger.prior=0.5")  # ranks fetch what is behind a head ahead of its tick, or in it


@pytest.fixture(scope="module")
def wall(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "wall"
    run_kept(small(*WALL, *HEADS, "swarm.pp=2", "anchor.workers=2"), run)
    return run


def test_corrections_are_merged_late_and_recorded(wall: Path):
    corrections = lines(wall, "corrections.jsonl")
    merged = [c for c in corrections if c["first_tick"] is not None]
    assert len(merged) >= 3
    assert [c["version"] for c in corrections] == list(range(1, len(corrections) + 1))
    assert all(c["lag"] == c["first_tick"] - c["source_tick"] >= 1 for c in merged)
    firsts = {c["first_tick"]: c for c in merged}
    held = None
    for record in of_kind(wall, "tick"):
        held = firsts.get(record["tick"], held)
        assert record.get("anchor/version") == (held and held["version"])
        if held:
            assert record["anchor/lag"] == record["tick"] - held["source_tick"]
            assert record["anchor/age"] == record["tick"] - held["first_tick"]


def test_a_wall_run_replayed_from_its_record_gives_the_same_corrections_and_weights(wall: Path, tmp_path: Path):
    import json

    replay = tmp_path / "replay"
    overrides = ("run.steps=12", "val.every=12", "swarm.pp=2", "anchor.lag.kind=trace")
    config = small(*overrides, *HEADS, f"anchor.lag.path={wall / 'corrections.jsonl'}")
    summary = run_kept(config, replay)
    found, expected = lines(replay, "corrections.jsonl"), lines(wall, "corrections.jsonl")
    spent = {record["anchor/version"] for record in of_kind(wall, "tick") if record.get("merger/dose")}
    sent = [c["bytes"] for c in expected if c["first_tick"] is not None]
    assert spent and min(sent) < 0.5 * max(sent)
    for mine, theirs in zip(found, expected, strict=True):
        if mine["version"] not in spent:  # ahead of its tick the wall run may have sent what is behind its head
            assert mine.pop("bytes") <= theirs.pop("bytes")
    assert found == expected
    assert summary["weights_digests"] == json.loads((wall / "summary.json").read_text())["weights_digests"]


def test_a_shared_stream_gives_the_same_run_and_sends_no_snapshot(tmp_path: Path):
    aligned = ("anchor.delay_k=4", "anchor.cadence=2", "run.steps=4", "val.every=4")
    own = run_kept(small(*aligned), tmp_path / "own")
    shared = run_kept(small(*aligned, "anchor.weights=shared"), tmp_path / "shared")
    assert shared["weights_digests"] == own["weights_digests"]
    assert lines(tmp_path / "shared", "corrections.jsonl") == lines(tmp_path / "own", "corrections.jsonl")
    assert own["bytes"]["snapshot"]["sent"] > 0 and "snapshot" not in shared["bytes"]
    sync = own["bytes"]["rollout_sync"]
    assert sync["sent"] < sync["dense"]


def test_a_correction_that_is_refused_leaves_the_line_and_is_recorded(tmp_path: Path):
    """More of them than may be under way at once."""
    trace = tmp_path / "trace.csv"
    trace.write_text("source_tick,first_tick\n0,3\n3,6\n6,7\n7,11\n")
    run, lag = tmp_path / "run", ("anchor.lag.kind=trace", f"anchor.lag.path={trace}")
    summary = run_kept(small(*lag, "anchor.max_lag=2", "anchor.delay_k=1"), run)
    assert [(c["source_tick"], c["first_tick"]) for c in lines(run, "corrections.jsonl")] == [
        (0, None),
        (3, None),
        (6, 7),
        (7, None),
    ]
    refused = [(r["tick"], r["version"]) for r in of_kind(run, "event") if r["event"] == "correction refused"]
    assert refused == [(3, 1), (6, 2), (11, 4)]
    assert summary["anchor_backwards"] == 4 and summary["bytes"]["correction"]["sent"] > 0
    assert {r["anchor/version"] for r in of_kind(run, "tick") if "merger/dose" in r} == {3}


def test_a_wall_run_goes_on_from_its_checkpoint(tmp_path: Path):
    """With `delta`, whose corrections are dense, and a replay of half of each batch."""
    run = tmp_path / "stopped"
    config = ["anchor.clock=wall", "run.checkpoint_every=4", "run.steps=8", "val.every=8", "anchor.slowdown=4.0"]
    config += ["merger.kind=delta", "anchor.replay_fraction=0.5"]
    run_kept(small(*config), run)
    versions = [c["version"] for c in lines(run, "corrections.jsonl") if (c["first_tick"] or 0) <= 8]
    as_if_killed(run, 8)
    summary = run_kept(small(*config), run, resume=True)
    assert summary["status"] == "completed" and summary["steps"] == 8
    assert [r["tick"] for r in of_kind(run, "tick")] == list(range(1, 17))
    again = [c["version"] for c in lines(run, "corrections.jsonl")]
    assert again and again[: len(versions)] == versions and again == sorted(set(again))


def test_lost_bases_are_mended_with_whole_snapshots_and_a_dead_anchor_is_renewed_beside_the_run(tmp_path: Path):
    """An engine and an anchor worker no longer know what they hold, the other is killed; the run goes on, and says so."""
    run = tmp_path / "lost"
    run.mkdir()
    config = small("anchor.clock=wall", "anchor.workers=2", "run.steps=3", "val.every=12")
    with new_actors(config) as actors:
        coordinator = Coordinator(config, actors, Telemetry(run, ignore), run)
        coordinator.run()
        ray.get(
            [actors.engines[0].__ray_call__.remote(forget_engine), actors.anchors[0].__ray_call__.remote(forget_anchor)]
        )
        coordinator.config = small("anchor.clock=wall", "run.steps=14", "val.every=14", "run.checkpoint_every=1")
        served = kill_the_second_at_its_next_fire(coordinator)
        coordinator.run()
    events = [(r["event"], r["tick"]) for r in of_kind(run, "event")]
    names = [name for name, _ in events]
    for name in ("weights resynchronised", "snapshot lost", "anchor lost", "anchor renewed"):
        assert names.count(name) == 1
    at = dict(events)
    between = [k for source, k in served if at["anchor lost"] <= source < at["anchor renewed"]]
    assert set(between) <= {0} and {k for source, k in served if source >= at["anchor renewed"]} == {0, 1}
    merged = [c["first_tick"] for c in lines(run, "corrections.jsonl") if c["first_tick"]]
    assert merged[-1] > 18  # the anchor is back after its losses


def kill_the_second_at_its_next_fire(coordinator: Coordinator) -> list[tuple[int, int]]:
    """And before tick 19 wait for the newcomer: ten ticks take less than its start. Source tick and worker of every fire."""
    line, anchors, tick = coordinator.corrections.line, coordinator.fleet.anchors, coordinator._tick
    start, second, served = line.start, anchors[1], list[tuple[int, int]]()

    def started(due: Due, k: int, *rest: Any) -> None:
        start(due, k, *rest)
        served.append((due.source_tick, k))
        if anchors[k] is second:
            ray.kill(second)

    def held(index: int, mini: MiniFrame) -> dict[str, float]:
        if coordinator.progress.tick == 18 and line.away:
            ray.get(anchors[1].__ray_ready__.remote(), timeout=120)
        return tick(index, mini)

    line.start, coordinator._tick = started, held
    return served


def forget_engine(worker: Any) -> None:
    worker.receiver.tick = 999


def forget_anchor(anchor: Any) -> None:
    anchor.dense.receiver.tick = 999
