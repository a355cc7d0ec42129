"""A grid that is extended: how far, for which arms, and how a sweep goes on that was stopped meanwhile."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy import cli
from deploy.cluster import sweep_lanes, sweep_runs
from deploy.cluster.sweep_runs import SweepRun
from deploy.config import to_toml
from experiments.cells import beyond_grid, chosen
from experiments.report import report_markdown
from experiments.sweep import Job, Sweep, keep_sweep
from tests.unit.experiments.test_sweep_report import CELLS, decouple, leave, said


def peak(at: float) -> Callable[[Job], float]:
    """Accuracy of a run whose arm is best at a learning rate of `at`."""
    return lambda job: 0.8 - 0.05 * abs(math.log2(job.point["grpo.lr"] / at))


PEAKS = {"A": peak(2e-5), "floor": peak(2.4e-4), "dense": peak(1.0), "D": peak(1.5e-6)}


class Machine:
    """Stands for what runs a sweep: leaves folders, up to the run at which it is interrupted."""

    def __init__(self, limit: int | None = None):
        self.ran: list[str] = []
        self.limit = limit

    def __call__(self, runs: list[SweepRun], *_: Any) -> bool:
        for run in [run for run in runs if run.state != "completed"]:
            if len(self.ran) == self.limit:
                return False
            self.ran.append(run.label)
            diverges = run.job.cell == "floor" and run.job.point["grpo.lr"] > 3e-4
            run.state = "failed" if diverges else "completed"
            shutil.rmtree(run.folder, ignore_errors=True)
            leave(run.folder.parents[1], run.job, PEAKS[run.job.cell](run.job), run.state)
            (run.folder / "config.toml").write_text(to_toml(run.config))
        return True


EXTENDED = """
name = "x"
base = "k5"
seeds = [4, 5, 6]
tuning = 1
extend = 3
[cells]
A = {}
floor = {anchor.enabled = false, merger.kind = "none"}
dense = {codec.kind = "none", anchor.enabled = false, merger.kind = "none"}
D = {anchor.delay_k = 20, anchor.cadence = 20}
[grid]
grpo.lr = [1e-5, 2e-5, 4e-5]
"""


@pytest.mark.parametrize("stops", [None, 5, 14, 19], ids=lambda stop: f"stopped after {stop}")
def test_a_grid_is_extended_arm_by_arm_until_the_best_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: int | None
):
    """Inside from the start (A), then a point that diverges (floor), never inside (dense), at the lower end (D)."""
    (tmp_path / "x.toml").write_text(EXTENDED)
    ran: list[str] = []
    for machine in [Machine(stops)] * bool(stops) + [Machine()]:
        monkeypatch.setattr(sweep_lanes, "execute_sweep", machine)
        monkeypatch.setattr(sweep_runs, "check_runs", lambda runs: None)
        result = CliRunner().invoke(cli.app, ["sweep", str(tmp_path / "x.toml"), "--out", str(tmp_path / "s")])
        ran += machine.ran
    assert result.exit_code == 1  # of the run that diverged
    grid = [f"{arm}-lr_{lr}, seed 4" for lr in (1e-5, 2e-5, 4e-5) for arm in ("A", "floor", "dense", "D")]
    rates = {"floor": (8e-5, 1.6e-4, 3.2e-4), "dense": (8e-5, 1.6e-4, 3.2e-4), "D": (5e-6, 2.5e-6, 1.25e-6)}
    beyond = [f"{arm}-lr_{lrs[i]}, seed 4" for i in range(3) for arm, lrs in rates.items()]
    best = {"A": 2e-5, "floor": 1.6e-4, "dense": 3.2e-4, "D": 1.25e-6}
    judging = [f"{arm}-lr_{lr}, seed {seed}" for seed in (5, 6) for arm, lr in best.items()]
    assert sorted(set(ran)) == sorted(grid + beyond + judging)
    assert [label for label in ran if ran.count(label) > 1] in ([], ["floor-lr_0.00032, seed 4"] * 2)
    words = said(tmp_path / "s")
    assert any(w.startswith("At their best at an end of the grid, also after its extension") for w in words)
    (edge,) = [w for w in words if "end of the grid, also" in w]
    assert edge.endswith("lie outside: dense lr 0.00032; D lr 1.25e-06.")
    assert words[-1] == (
        "Given points beyond the grid, as their best was at its end: floor to lr 0.00032, best at lr 0.00016; dense to lr "
        "0.00032, best at lr 0.00032; D to lr 1.25e-06, best at lr 1.25e-06."
    )
    assert "got points beyond it, 3 at most" in report_markdown([tmp_path / "s"])


def test_a_point_beyond_the_grid_that_was_not_run_yet_is_missing(tmp_path: Path):
    sweep = decouple(
        cells={"A": CELLS["A"]}, two_by_two=[], compare=[], gates={}, tuning=1, grid={"grpo": {"lr": [1e-5, 3e-5]}}
    )
    for extend in (0, 3):
        keep_sweep(sweep.model_copy(update={"extend": extend}), tmp_path / "s")
        for job in [] if extend else sweep.jobs():
            leave(tmp_path / "s", job, 0.6 + 1e3 * job.point["grpo.lr"])
        assert chosen(tmp_path / "s") == ({} if extend else {"A": {"grpo.lr": 3e-5}})
    assert beyond_grid(tmp_path / "s") == {"A": [{"grpo.lr": 9e-5}]}
    assert said(tmp_path / "s")[0].endswith("only completed ones count: 1 not run.")


def test_a_point_beyond_the_grid_that_no_run_may_have_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And the page is there: what has run is not lost."""
    text = 'name = "x"\nbase = "k5"\nseeds = [0, 1]\ntuning = 1\nextend = 3\n[grid]\nanchor.beta_anc = [0.5, 0.75]\n[cells]\nA = {}\n'
    (tmp_path / "x.toml").write_text(text)

    def execute(runs: list[Any], *_: object) -> bool:
        for run in runs:
            leave(tmp_path / "s", run.job, run.job.point["anchor.beta_anc"])
            run.state = "completed"
        return True

    monkeypatch.setattr(sweep_lanes, "execute_sweep", execute)
    monkeypatch.setattr(sweep_runs, "check_runs", lambda runs: None)
    result = CliRunner().invoke(cli.app, ["sweep", str(tmp_path / "x.toml"), "--out", str(tmp_path / "s")])
    assert (
        result.exit_code == 2 and "anchor.beta_anc = 1.125" in result.output and "a smaller `extend`" in result.output
    )
    assert (tmp_path / "s" / "report.html").exists()


def test_a_folder_is_of_one_sweep(tmp_path: Path):
    keep_sweep(Sweep.model_validate({"name": "x", "base": "k5", "seeds": [0], "cells": {"A": {}}}), tmp_path / "s")
    (tmp_path / "x.toml").write_text(
        'name = "x"\nbase = "k5"\nseeds = [0]\n[grid]\ngrpo.lr = [1e-5, 2e-5]\n[cells]\nA = {}\n'
    )
    before = (tmp_path / "s" / "sweep.toml").read_bytes()
    result = CliRunner().invoke(cli.app, ["sweep", str(tmp_path / "x.toml"), "--out", str(tmp_path / "s")])
    assert result.exit_code == 2 and "choose another --out" in result.output and "grpo.lr" in result.output
    assert (tmp_path / "s" / "sweep.toml").read_bytes() == before
