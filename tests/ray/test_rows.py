"""Whole runs on tables: what is left out and what is missing is said, and a run that met a limit goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cluster.launch import drive
from deploy.display.run_display import RunDisplay
from deploy.preflight import preflight
from rl.problems import check_same
from tests.ray.conftest import HELD, lines, of_kind, run_kept, small
from tests.unit.rl.test_data_rows import GOOD, LONG, write

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
ONE_STEP = "run.steps=1", "run.checkpoint_every=1", "anchor.enabled=false", "merger.kind=none"


def test_a_small_table_is_validated_on_row_by_row_and_what_is_left_out_is_said(tmp_path: Path, capsys):
    train, val = write(tmp_path / "train.jsonl", *GOOD, LONG), write(tmp_path / "val.jsonl", *GOOD[:3])
    table = f"task.name=jsonl:{train}", f'task.params={{val="{val}"}}', "task.overlong=drop", "val.by=answer"
    own = write(tmp_path / "set.jsonl", *GOOD[50:55])
    table += (f'val.sets.five={{task="jsonl:{own}", size="all", samples=2, temperature=1.0, by=""}}',)
    config, run = small(*ONE_STEP, *table, "rollout.replicas=2", "rollout.val_temperature=0.0"), tmp_path / "run"
    run_kept(config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}), tmp_path / "seed 1")
    drive(config, run, RunDisplay(config, run), actors=HELD.lent)
    events = {record["event"]: record for record in of_kind(run, "event")}
    left_out, fewer = events["rows left out"], events["fewer validation problems"]
    assert (left_out["left_out"], left_out["rows"]) == (1, 201) and (fewer["problems"], fewer["asked"]) == (3, 8)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"rows left out: 1 of 201 of {train}" in shown
    assert "fewer validation problems: 3 where val.size is 8" in shown
    other, now = of_kind(tmp_path / "seed 1", "val")[0], of_kind(run, "val")[0]
    figures = ("accuracy", "val-aux/response_length/mean")
    assert [other[name] for name in figures] == [now[name] for name in figures]  # greedy, on the same rows
    (five,) = [name for name in now if name.startswith("val-core/five/") and name.endswith("mean@2")]
    names = {name.split("/")[-3] for name in now if name.startswith("val-core/") and name.endswith("mean@1")}
    assert names >= {row["answer"] for row in GOOD[:3]} and now["sets"]["five"] == now[five]
    assert f"validation accuracy {now['accuracy']:.3f}" in shown and f" five {now[five]:.3f}" in shown
    asked = [s for s in lines(run, "samples.jsonl") if s.get("set") == "five" and s["step"] == 0]
    assert len(asked) == 10 and {s["prompt"] for s in asked} == {row["prompt"] for row in GOOD[50:55]}
    assert now["accuracy"] * 3 == pytest.approx(round(now["accuracy"] * 3), abs=1e-6)
    (stored, *_) = json.loads((run / "data.json").read_text())
    check_same(run / "data.json", preflight(config))
    assert stored["left_out"] == 1 and stored["name"] == str(train)


def test_a_run_that_met_its_limits_goes_on_with_higher_ones(tmp_path: Path):
    keys = ["run.checkpoint_every=1", "anchor.enabled=false", "merger.kind=none", "val.size=2"]
    run_kept(small(*keys, "run.steps=1", "grpo.max_prompt_length=10", "grpo.max_response_length=6"), tmp_path)
    assert of_kind(tmp_path, "step")[0]["response_length/max"] == 6
    raised = small(*keys, "run.steps=2", "grpo.max_prompt_length=11", "grpo.max_response_length=40")
    assert run_kept(raised, tmp_path, resume=True)["status"] == "completed"
    first, second = of_kind(tmp_path, "step")
    assert first["response_length/max"] == 6 < second["response_length/max"]
