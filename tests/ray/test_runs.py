"""Whole runs with real actors: determinism, resume, replicas, the files a run leaves."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import ray

from anchor_service.errors import ActorLost
from deploy.cluster.kept_actors import new_actors
from deploy.config import load
from swarm.coordinator import Coordinator
from swarm.replay_choice import MiniFrame
from swarm.telemetry import Telemetry
from tests.ray.conftest import as_if_killed, ignore, kill_engine_in, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def first(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with: one worker, a virtual boundary, checkpoints on the way."""
    run = tmp_path_factory.mktemp("runs") / "first"
    run_kept(small("run.checkpoint_every=3"), run)
    return run


def test_it_leaves_the_run_folder_of_the_design(first: Path):
    summary = json.loads((first / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 6 and summary["ticks"] == 12
    assert [v["step"] for v in summary["validations"]] == [0, 6]
    assert load(str(first / "config.toml")) == small("run.checkpoint_every=3")  # re-runnable as it is
    assert tomllib.loads((first / "config.toml").read_text())["codec"]["rank"] == 4
    assert len(of_kind(first, "tick")) == 12 and len(of_kind(first, "step")) == 6
    assert list(first.glob("events.out.tfevents.*"))
    tick = of_kind(first, "tick")[-1]
    expected = (
        "actor/pg_loss actor/pg_clipfrac actor/ppo_kl actor/entropy actor/grad_norm actor/lr anchor/lag anchor/age"
    )
    expected += (
        " anchor/backwards anchor/sign_agreement merger/dose merger/flip_fraction codec/q_error codec/q_refreshed"
    )
    assert set(expected.split()) <= set(tick)
    step = of_kind(first, "step")[-1]
    expected = "critic/rewards/mean response_length/mean response_length/max response_length/clip_ratio perf/throughput"
    expected += (
        " timing_s/gen timing_s/step training/rollout_probs_diff_mean rollout_corr/kl comm/bytes_ratio comm/total_ratio"
    )
    assert set(expected.split()) <= set(step)
    assert "val-core/sums/acc/mean@1" in of_kind(first, "val")[0]


def test_fires_lags_and_ages_follow_the_contract(first: Path):
    fires = lines(first, "corrections.jsonl")
    assert [f["first_tick"] for f in fires] == [4, 6, 8, 10, 12]  # T % 2 == 0 and T >= 3
    assert [f["version"] for f in fires] == [1, 2, 3, 4, 5]
    assert all(f["source_tick"] == f["first_tick"] - 3 and f["lag"] == 3 for f in fires)
    for record in of_kind(first, "tick"):
        tick = record["tick"]
        if tick < 4:
            assert "anchor/lag" not in record and "merger/dose" not in record
        else:
            assert record["anchor/age"] == tick % 2 and record["anchor/lag"] == 3 + tick % 2
        assert record["codec/q_refreshed"] == float(tick >= 2 and tick % 2 == 0)


def test_the_same_seed_gives_the_same_run_also_with_a_slow_anchor(first: Path, tmp_path: Path):
    summary = run_kept(small("anchor.slowdown=5.0"), tmp_path / "slow")
    assert lines(tmp_path / "slow", "corrections.jsonl") == lines(first, "corrections.jsonl")
    assert summary["weights_digests"] == json.loads((first / "summary.json").read_text())["weights_digests"]


def test_dense_corrections_give_the_same_weights_as_sign_planes_and_more_engines_too(first: Path, tmp_path: Path):
    summary = run_kept(small("anchor.payload=dense", "rollout.replicas=2"), tmp_path / "dense")
    reference = json.loads((first / "summary.json").read_text())
    assert summary["weights_digests"] == reference["weights_digests"]
    ratio = reference["bytes"]["correction"]["sent"] / summary["bytes"]["correction"]["sent"]
    assert ratio < 1 / 31


def test_a_resumed_run_ends_where_the_uninterrupted_one_did(first: Path, tmp_path: Path):
    import shutil

    run = tmp_path / "resumed"
    shutil.copytree(first, run)
    as_if_killed(run, 6)
    summary = run_kept(small("run.checkpoint_every=3"), run, resume=True)
    reference = json.loads((first / "summary.json").read_text())
    assert summary["weights_digests"] == reference["weights_digests"]
    assert lines(run, "corrections.jsonl") == lines(first, "corrections.jsonl")
    assert summary["validations"] == reference["validations"]
    assert [r["tick"] for r in of_kind(run, "tick")] == list(range(1, 13))
    steps = {r["tick"]: r for r in of_kind(run, "tick")}
    assert steps[7]["comm/replay_bytes"] <= steps[6]["comm/replay_bytes"] * 1.5  # of a tick, not of the run so far
    for channel, counted in reference["bytes"].items():
        if channel not in ("rollout_sync", "snapshot"):  # streams begin again with whole snapshots
            assert summary["bytes"][channel] == counted


def test_a_dose_of_nothing_is_a_run_without_a_merger_for_which_nothing_is_sent(tmp_path: Path):
    none = run_kept(small("merger.dose=0.0"), tmp_path / "none")
    floor = run_kept(small("merger.kind=none", "codec.q_cadence=2"), tmp_path / "floor")
    assert none["weights_digests"] == floor["weights_digests"] and none["bytes"] == floor["bytes"]
    assert not {"snapshot", "replay", "correction"} & set(none["bytes"])
    assert lines(tmp_path / "none", "corrections.jsonl") == []


def test_a_grid_of_four_keeps_replicas_equal_and_names_a_flipped_bit(tmp_path: Path):
    grid = "swarm.dp=2", "swarm.pp=2", "anchor.enabled=false", "merger.kind=none"
    config = small(*grid, "run.steps=2")
    with new_actors(config) as actors:
        telemetry = Telemetry(_made(tmp_path / "grid"), ignore)
        coordinator = Coordinator(config, actors, telemetry, tmp_path / "grid")
        coordinator.run()
        d0p0, d0p1, d1p0, d1p1 = telemetry.digests
        assert d0p0 == d1p0 and d0p1 == d1p1 and d0p0 != d0p1

        def flip(worker) -> None:
            import torch

            worker.rank.stage.weights.master.view(torch.int32)[1000] ^= 1

        ray.get(actors.workers[3].__ray_call__.remote(flip), timeout=30)
        coordinator.config = small(*grid, "run.steps=3")
        with pytest.raises(Exception, match=r"worker d1p1 changed since tick 4") as caught:
            coordinator.run()
        assert "ReplicaMismatch" in type(caught.value).__name__ or "ReplicaMismatch" in str(caught.value)


def test_dead_engines_and_anchors_are_renewed_as_if_nothing_had_happened_and_a_dead_worker_is_named(tmp_path: Path):
    """Engines killed before the first weights, and again in the middle of a run; the anchor with a fire under way."""
    # slow enough that its fire is still under way when it is killed
    config = small("run.steps=3", "rollout.replicas=2", "anchor.slowdown=20")
    calm = run_kept(config, tmp_path / "calm")
    folder = _made(tmp_path / "deadly")
    with new_actors(config) as actors:
        telemetry = Telemetry(folder, ignore)
        coordinator = Coordinator(config, actors, telemetry, folder)
        ray.kill(actors.engines[0])
        kill_engine_in(2, coordinator)
        offer = coordinator.corrections.offer

        def kill(mini: MiniFrame) -> bool:
            started = offer(mini)
            if coordinator.progress.tick == 3:
                assert started
                ray.kill(actors.anchors[0])
                newest = max(coordinator.corrections.line.under_way)
                lost = coordinator.corrections.line.under_way[newest].report
                assert ray.wait([lost], timeout=30)[0]  # its death is known: it is met in the tick that follows
            return started

        coordinator.corrections.offer = kill
        coordinator.run()
        assert telemetry.digests == calm["weights_digests"]
        assert lines(folder, "corrections.jsonl") == lines(tmp_path / "calm", "corrections.jsonl")
        ray.kill(actors.workers[0])  # no new engine can mend this
        with pytest.raises(ActorLost, match="worker d0p0 ended before it delivered the weights of tick 6"):
            coordinator.run()
        telemetry.finish("failed", {})
    events = [(e["event"], e["step"]) for e in of_kind(folder, "event") if e["event"].endswith("renewed")]
    assert events == [("engine renewed", 0), ("anchor renewed", 2), ("engine renewed", 2)]  # as each is met


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
