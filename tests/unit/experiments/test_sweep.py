"""Sweep files: how they expand, what is refused before anything starts, which runs are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from deploy import cli
from deploy.cluster.sweep_runs import planned_runs
from deploy.config import load, to_toml
from experiments.sweep import FILE, Sweep, SweepError, find_sweep, flat, keep_sweep, nested, read_sweep, sweep_names

TEXT = """
name = "try"
base = "k5"
seeds = [0, 7]
compare = [["A", "floor"]]
[cells]
A = {}
D.anchor = {delay_k = 20, cadence = 20}
floor = {anchor.enabled = false, "merger.kind" = "none"}
[gates]
base = "A"
"""


def write(folder: Path, text: str = TEXT) -> Path:
    file = folder / "try.toml"
    file.write_text(text)
    return file


def test_every_cell_is_planned_at_every_seed_with_the_config_of_its_overrides(tmp_path: Path):
    runs = planned_runs(read_sweep(write(tmp_path)), tmp_path / "out", ["run.steps=3"])
    assert [run.job.folder.as_posix() for run in runs] == [
        f"{cell}/seed-{seed}" for seed in (0, 7) for cell in ("A", "D", "floor")
    ]
    sets = {
        "A": [],
        "D": ["anchor.delay_k=20", "anchor.cadence=20"],
        "floor": ["anchor.enabled=false", "merger.kind=none"],
    }
    for run in runs:
        own = [f"run.name={run.job.name}", f"run.seed={run.job.seed}", "run.steps=3"]
        assert run.config == load("k5", sets[run.job.cell] + own)
        assert run.state == "waiting"


def test_a_grid_multiplies_every_cell_and_names_its_folders(tmp_path: Path):
    sweep = read_sweep(write(tmp_path, TEXT + "[grid]\ngrpo.lr = [1e-5, 3e-5]\ncodec.rank = [4, 8]\n"))
    runs = planned_runs(sweep, tmp_path / "out", [])
    assert len(runs) == 2 * 4 * 3 == len({run.folder for run in runs})
    for run in runs:
        assert (run.config.grpo.lr, run.config.codec.rank) == (run.job.point["grpo.lr"], run.job.point["codec.rank"])
    assert runs[0].job.name == "A-lr_1e-05-rank_4"


def test_flat_and_nested_are_each_others_opposite():
    keys = {"a.b.c": 1, "a.b.d": [1, 2], "a.e": "x", "f": None}
    assert flat(nested(keys)) == keys


def test_a_base_beside_the_sweep_file_is_found_from_anywhere(tmp_path: Path):
    (tmp_path / "mine.toml").write_text('extends = "k5"\n[run]\nsteps = 9\n')
    sweep = read_sweep(write(tmp_path, TEXT.replace('"k5"', '"mine.toml"')))
    assert planned_runs(sweep, tmp_path / "out", [])[0].config.run.steps == 9


BAD = {
    "not TOML": ("name = ", "not valid TOML"),
    "an unknown key": (TEXT.replace("[gates]", "gates.bas = 3\n[other]"), "unknown key"),
    "no cells": ("name = 'a'\nbase = 'k5'\nseeds = [1]", "cells is missing"),
    "a seed twice": (TEXT.replace("[0, 7]", "[1, 1]"), "names a seed twice"),
    "a seed in a cell": (TEXT.replace("A = {}", "A = {run.seed = 3}"), "cells.A sets run.seed"),
    "a gate on a cell that is not there": (TEXT.replace('base = "A"', 'base = "Z"'), "no cell Z (cells: A, D, floor)"),
    "three cells in a square": (TEXT.replace("[cells]", 'two_by_two = ["A", "D", "A", "floor"]\n[cells]'), "four"),
    "an axis that a cell sets": (TEXT + "[grid]\nanchor.delay_k = [1, 2]\n", "cells.D sets anchor.delay_k"),
    "an axis that is no list": (TEXT + "[grid]\ngrpo.lr = 3.0\n", "grid.grpo.lr = 3.0: must be a list"),
    "a value of an axis twice": (TEXT + "[grid]\ngrpo.lr = [3e-5, 0.00003]\n", "list of different values"),
    "a folder above": (TEXT.replace("A = {}", '".." = {}').replace('"A"', '".."'), "'..' cannot name a folder"),
    "a name that is no folder": (
        TEXT.replace("A = {}", '"../A" = {}').replace('"A"', '"../A"'),
        "cannot name a folder",
    ),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_a_bad_sweep_is_refused(tmp_path: Path, text: str, says: str):
    with pytest.raises(SweepError) as caught:
        read_sweep(write(tmp_path, text))
    assert says in str(caught.value)


def test_a_bad_cell_is_refused_by_name_before_anything_starts(tmp_path: Path):
    file = write(tmp_path, TEXT.replace("cadence = 20}", "cadenc = 20}"))
    with pytest.raises(SweepError, match=r"cell D, seed 0: k5: unknown key 'anchor.cadenc'; did you mean 'cadence'"):
        planned_runs(read_sweep(file), tmp_path / "out", [])
    result = CliRunner().invoke(cli.app, ["sweep", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "cell D, seed 0" in result.stderr and not (tmp_path / "out").exists()
    assert CliRunner().invoke(cli.app, ["sweep", "nowhere"]).exit_code == 2


def leave(folder: Path, config_text: str, status: str | None) -> None:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config_text)
    if status:
        (folder / "summary.json").write_text(json.dumps({"status": status}))


def test_only_completed_runs_of_the_same_config_are_left_alone(tmp_path: Path):
    sweep, out = read_sweep(write(tmp_path)), tmp_path / "out"
    fresh = planned_runs(sweep, out, [])
    for run, status in zip(fresh, ["completed", "failed", "interrupted", None]):
        leave(run.folder, to_toml(run.config), status)
    assert [run.state for run in planned_runs(sweep, out, [])] == ["completed"] + ["waiting"] * 5
    leave(fresh[4].folder, to_toml(load("k5", ["run.name=D", "run.seed=7", "anchor.delay_k=3"])), "completed")
    with pytest.raises(SweepError, match=r"another config \(anchor.cadence 5, now 20; anchor.delay_k 3, now 20\)"):
        planned_runs(sweep, out, [])


def test_a_folder_that_holds_something_else_is_never_cleared(tmp_path: Path):
    sweep = read_sweep(write(tmp_path))
    (tmp_path / "out" / "A" / "seed-0").mkdir(parents=True)
    assert len(planned_runs(sweep, tmp_path / "out", [])) == 6  # an empty folder is nobody's
    (tmp_path / "out" / "A" / "seed-0" / "thesis.tex").write_text("")
    with pytest.raises(SweepError, match="holds no run of this sweep"):
        planned_runs(sweep, tmp_path / "out", [])


def test_what_is_kept_in_the_folder_is_the_sweep(tmp_path: Path):
    sweep = read_sweep(write(tmp_path, TEXT + "[grid]\ngrpo.lr = [1e-5]\n"))
    keep_sweep(sweep, tmp_path / "out")
    kept = read_sweep(tmp_path / "out" / FILE)
    assert kept.jobs()[1].tables() == sweep.jobs()[1].tables()
    assert Sweep.model_validate(kept.model_dump(exclude_none=True)) == kept


@pytest.mark.parametrize("name", sweep_names())
def test_every_shipped_sweep_expands_to_good_configs_that_differ(data_at_hand: None, name: str, tmp_path: Path):
    sweep = read_sweep(find_sweep(name))
    assert sweep.name == name
    runs = planned_runs(sweep, tmp_path, [])
    assert len(runs) == len(sweep.cells) * len(sweep.points()) * len(sweep.seeds[: sweep.tuning or None])
    first = [run.config.model_dump(exclude={"run"}) for run in runs if run.job.seed == sweep.seeds[0]]
    assert all(a != b for i, a in enumerate(first) for b in first[:i])


def test_seeds_that_tune_run_the_grid_and_the_others_the_chosen_points():
    sweep = Sweep(
        name="t", base="k5", seeds=[4, 5, 6], tuning=1, cells={"A": {}, "B": {}}, grid={"grpo.lr": [1e-5, 1e-4]}
    )
    assert [(j.cell, j.seed, j.point["grpo.lr"]) for j in sweep.jobs()] == [
        ("A", 4, 1e-5), ("B", 4, 1e-5), ("A", 4, 1e-4), ("B", 4, 1e-4)
    ]  # fmt: skip
    judging = sweep.jobs_at({"A": {"grpo.lr": 1e-4}, "B": {"grpo.lr": 1e-5}})
    assert [(j.cell, j.seed, j.point["grpo.lr"]) for j in judging] == [
        ("A", 5, 1e-4), ("B", 5, 1e-5), ("A", 6, 1e-4), ("B", 6, 1e-5)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"needs a \[grid\]"):
        Sweep(name="t", base="k5", seeds=[4, 5], tuning=1, cells={"A": {}})
    with pytest.raises(ValueError, match="leaves none of 2 seeds"):
        Sweep(name="t", base="k5", seeds=[4, 5], tuning=2, cells={"A": {}}, grid={"grpo.lr": [1e-5]})


GRID = {"name": "t", "base": "k5", "seeds": [4, 5], "tuning": 1, "cells": {"A": {}}}


def test_a_point_beyond_the_grid_keeps_the_ratio_of_the_last_two():
    sweep = Sweep.model_validate(GRID | {"grid": {"grpo.lr": [6e-5, 3e-5, 1.8e-4]}, "extend": 2})
    points = sweep.points()
    assert sweep.beyond(points, {"grpo.lr": 6e-5}) is None
    assert sweep.beyond(points, {"grpo.lr": 1.8e-4}) == {"grpo.lr": 5.4e-4}
    assert sweep.beyond(points, {"grpo.lr": 3e-5}) == {"grpo.lr": 1.5e-5}
    beyond = sweep.jobs_beyond({"A": [{"grpo.lr": 5.4e-4}]})
    assert [(job.name, job.seed) for job in beyond] == [("A-lr_0.00054", 4)]


@pytest.mark.parametrize(
    "more",
    [
        {"grid": {"grpo.lr": [1e-5]}},
        {"grid": {"codec.rank": [4, 8]}},
        {"grid": {"grpo.lr": [0.0, 1e-5]}},
        {"grid": {"grpo.lr": [1e-5, 2e-5], "merger.dose": [0.5, 1.0]}},
        {"grid": {"grpo.lr": [1e-5, 2e-5]}, "tuning": 0},
    ],
)
def test_a_grid_that_has_no_ratio_is_not_extended(more: dict):
    assert Sweep.model_validate(GRID | more)
    with pytest.raises(ValueError, match=r"extend = 2: needs tuning, and a \[grid\] of one axis"):
        Sweep.model_validate(GRID | more | {"extend": 2})


def test_the_shipped_2x2_raises_delay_and_cadence_and_nothing_else(tmp_path: Path):
    runs = planned_runs(read_sweep(find_sweep("decouple")), tmp_path, [])
    cells = {run.job.cell: flat(run.config.model_dump()) for run in runs if run.job.seed == 0}
    square = {cell: (c["anchor.delay_k"], c["anchor.cadence"]) for cell, c in cells.items() if cell in "ABCD"}
    assert square == {"A": (5, 5), "B": (20, 5), "C": (5, 20), "D": (20, 20)}
    for cell in "BCD":
        differ = {k for k in cells["A"] if cells["A"][k] != cells[cell].get(k)}
        assert differ <= {"anchor.delay_k", "anchor.cadence", "run.name"}
    assert len({run.config.q_cadence for run in runs}) == 1
    assert len({run.job.seed for run in runs}) == 5


def test_the_same_question_of_another_base_and_over_other_seeds():
    sweep = read_sweep(find_sweep("decouple"))
    other = sweep.but("k20", "7,9")
    assert (other.base, other.seeds, other.cells) == ("k20", [7, 9], sweep.cells) and sweep.but(None, None) == sweep


def test_a_grid_is_left_where_its_axis_is_given():
    sweep = read_sweep(find_sweep("placebo"))
    other = sweep.but(None, None, ["grpo.lr", "run.steps"])
    assert (other.points(), other.tuning, other.extend) == ([{}], 0, 0)
    assert [job.seed for job in other.jobs()] == [seed for seed in (1, 2, 3) for _ in sweep.cells]
    assert sweep.but(None, "0,7", ["grpo.lr"]).seeds == [0, 7]
    assert sweep.but(None, None, ["run.steps"]) == sweep
    two = sweep.model_copy(update={"grid": {"grpo": {"lr": [1.0, 2.0]}, "merger": {"dose": [0.5, 1.0]}}})
    assert two.but(None, None, ["merger.dose"]).points() == [{"grpo.lr": 1.0}, {"grpo.lr": 2.0}]


@pytest.mark.parametrize(
    ("seeds", "says"), [("0,0", "names a seed twice"), ("1,b", "whole numbers"), ("", "whole numbers"), ("2", "tuning")]
)
def test_other_seeds_are_checked_like_those_of_the_file(seeds: str, says: str):
    with pytest.raises(SweepError, match=says):
        read_sweep(find_sweep("placebo")).but(None, seeds)


@pytest.mark.parametrize("command", [["sweep", "decouple"], ["run", "k5"]], ids=" ".join)
def test_a_folder_that_another_command_writes_to_is_left_alone(command: list[str], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        result = CliRunner().invoke(cli.app, [*command, "--out", str(out)])
    assert result.exit_code == 2 and f"another northstar command is writing to {out}" in result.output
    assert [file.name for file in out.iterdir()] == [".lock"]
