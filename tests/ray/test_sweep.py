"""Sweeps with real actors: a kept actor gives the bits of a new one; failures and what is done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster.launch import drive
from deploy.cluster.sweep_lanes import Lanes
from deploy.cluster.sweep_runs import SweepRun, planned_runs
from experiments.sweep import Sweep
from tests.ray.conftest import HELD, SIZES, as_if_killed, ignore, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Quiet:
    """Remembers the states that were seen."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def changed(self, run: SweepRun) -> None:
        self.seen.append((run.job.name, run.state))

    def record(self, run: SweepRun, record: dict[str, Any]) -> None: ...


def measured(run: Path) -> list[dict[str, Any]]:
    """All records, without times and memory."""
    clock = ("timing_s/", "perf/")
    return [{k: v for k, v in record.items() if not k.startswith(clock)} for record in lines(run, "metrics.jsonl")]


def same(kept: Path, new: Path) -> None:
    assert measured(kept) == measured(new)
    assert lines(kept, "corrections.jsonl") == lines(new, "corrections.jsonl")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (kept, new)]
    for key in ("weights_digests", "bytes", "validations"):
        assert summaries[0][key] == summaries[1][key]


def test_a_run_on_kept_actors_is_to_the_bit_the_run_on_new_ones(tmp_path: Path):
    """After another seed, codec, merger and layout, and with fewer workers than are held.

    Of a grid of four, test_nodes.py holds the same.
    """
    other = "run.seed=5", "merger.kind=delta", "codec.rank=8", "anchor.beta_anc=0.9"
    run_kept(small("swarm.dp=2", "swarm.pp=2", "codec.gradient.kind=powersgd", *other), tmp_path / "before")
    workers = list(HELD.group.actors["worker"])
    run_kept(small("anchor.enabled=false", "merger.kind=none"), tmp_path / "floor")
    config = small("anchor.lag.kind=uniform")
    run_kept(config, tmp_path / "kept")
    assert HELD.group.actors["worker"] == workers  # the same processes all along
    drive(config, tmp_path / "new", ignore)
    same(tmp_path / "kept", tmp_path / "new")
    assert "anchor/lag" not in of_kind(tmp_path / "floor", "tick")[-1]


def test_a_failure_ends_one_run_and_only_that_is_done_again(tmp_path: Path):
    fails, holds = {"codec": {"max_kl": 0.001}}, {"codec": {"rank": 8}}
    sweep = Sweep(name="s", base="k5", seeds=[3], cells={"A": {}, "bad": fails, "other": holds})
    out, sets = tmp_path / "out", [*SIZES, "run.steps=3", "anchor.enabled=false", "merger.kind=none"]
    runs, watcher = planned_runs(sweep, out, sets), Quiet()
    assert Lanes(runs, watcher).run(1)
    assert [run.state for run in runs] == ["completed", "failed", "completed"]
    assert "PolicyChanged" in runs[1].error
    assert watcher.seen == [(run.job.name, state) for run in runs for state in ("starting", run.state)]
    assert [run.state for run in planned_runs(sweep, out, sets)] == ["completed", "waiting", "completed"]
    again = planned_runs(sweep, out, sets)
    assert Lanes([run for run in again if run.state == "waiting"], watcher).run(1)
    (folder,) = out.joinpath("bad").iterdir()  # what was set aside while it was cleared is gone
    assert [r["event"] for r in of_kind(folder, "event")].count("started") == 1
    run_kept(runs[2].config, tmp_path / "other")
    same(runs[2].folder, tmp_path / "other")


def test_placebos_run_without_an_anchor_and_go_on_from_a_checkpoint(tmp_path: Path):
    """On the anchor's schedule: the same ticks merge, at the same lags and ages, with the same dose."""
    for kind in ("own", "random"):
        config = small("anchor.enabled=false", f"merger.placebo={kind}", "run.checkpoint_every=3")
        run = tmp_path / kind
        summary = run_kept(config, run)
        ticks = of_kind(run, "tick")
        merged = [(r["tick"], r["anchor/lag"], r["anchor/age"], r["merger/dose"]) for r in ticks if "anchor/lag" in r]
        assert merged == [(t, 3 + t % 2, t % 2, 1.0) for t in range(4, 13)]
        assert summary["anchor_backwards"] == 0 and "correction" not in summary["bytes"]
        as_if_killed(run, 6)
        assert run_kept(config, run, resume=True)["weights_digests"] == summary["weights_digests"]


def test_lanes_side_by_side_share_the_work_and_stop_together(tmp_path: Path):
    cells = {"a": {}, "b": {"run": {"steps": 5000}}, "c": {"run": {"steps": 5000}}, "d": {}}
    sweep = Sweep(name="s", base="k5", seeds=[0], cells=cells)
    sets = [*SIZES, "run.steps=2", "anchor.enabled=false", "merger.kind=none"]
    runs, watcher = planned_runs(sweep, tmp_path, sets), Quiet()
    lanes = Lanes(runs, watcher)

    class StopsOnce(Quiet):
        def record(self, run: SweepRun, record: dict[str, Any]) -> None:
            if run.job.cell == "c" and record["step"] == 3:  # the lane that has finished a; the other is in b
                lanes.stop.set()

    lanes.watcher = StopsOnce()
    assert not lanes.run(2)
    assert [run.state for run in runs] == ["completed", "interrupted", "interrupted", "waiting"]
    assert [run.state for run in planned_runs(sweep, tmp_path, sets)] == ["completed", "waiting", "waiting", "waiting"]
