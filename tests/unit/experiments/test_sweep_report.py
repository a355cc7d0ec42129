"""The report of a sweep, on run folders written here with known answers: what it says first, and of what it is silent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy import cli
from experiments.cells import chosen, load_sweep
from experiments.report import report_markdown, write_html
from experiments.sweep import Job, Sweep, flat, keep_sweep
from experiments.verdict import square, verdict

STEPS = 40
CELLS: dict[str, dict[str, Any]] = {
    "A": {"anchor": {"delay_k": 5, "cadence": 5}},
    "B": {"anchor": {"delay_k": 20, "cadence": 5}},
    "C": {"anchor": {"delay_k": 5, "cadence": 20}},
    "D": {"anchor": {"delay_k": 20, "cadence": 20}},
    "dense": {"codec": {"kind": "none"}},
    "floor": {"merger": {"kind": "none"}},
}
MEANS = {"A": 0.75, "B": 0.73, "C": 0.40, "D": 0.20, "dense": 0.89, "floor": 0.59}


def decouple(**more: Any) -> Sweep:
    data = {"gates": {"base": "A", "floor": "floor"}, "two_by_two": ["A", "B", "C", "D"], "compare": [["A", "floor"]]}
    return Sweep.model_validate({"name": "try", "base": "k5", "seeds": [0, 1, 2], "cells": CELLS} | data | more)


def leave(folder: Path, job: Job, end: float, status: str = "completed", ignites: int | None = None) -> None:
    """A run folder as the telemetry leaves it; length, and entropy 5 steps later, double at step `ignites`."""
    run = folder / job.folder
    run.mkdir(parents=True)
    settings = [
        f"{k} = {json.dumps(v)}" for k, v in flat({"run": {"name": job.name, "seed": job.seed}} | job.changes).items()
    ]
    settings += [f"{k} = {json.dumps(v)}" for k, v in job.point.items()]
    (run / "config.toml").write_text("\n".join(settings) + "\n")
    rng = np.random.default_rng(job.seed)
    steps = STEPS if status == "completed" else STEPS // 2
    records: list[dict[str, Any]] = [{"kind": "val", "step": 0, "tick": 0, "accuracy": 0.45}]
    for s in range(1, steps + 1):
        late = [2.0 if ignites and s >= ignites + wait else 1.0 for wait in (0, 5)]
        length, entropy = (base * (1 + 0.02 * rng.normal()) * x for base, x in zip((12.0, 0.4), late))
        records += [
            {"kind": "step", "step": s, "tick": 2 * s, "response_length/mean": length, "actor/entropy": entropy}
        ]
        if s % 20 == 0:
            accuracy = 0.45 + (end - 0.45) * s / STEPS
            records += [{"kind": "val", "step": s, "tick": 2 * s, "accuracy": accuracy}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = {"name": job.name, "seed": job.seed, "status": status, "steps": steps, "wall_s": 60.0, "error": None}
    summary |= {"bytes": {"boundary_fwd": {"sent": 5e6, "dense": 1e8}}}
    summary |= {"error": "PolicyChanged: codec"} if status == "failed" else {}
    (run / "summary.json").write_text(json.dumps(summary))


def fill(folder: Path, sweep: Sweep, noise: float = 0.01) -> Path:
    """Every run of the sweep, around the means; cell D ignites."""
    keep_sweep(sweep, folder)
    for job in sweep.jobs():
        wobble = noise * np.random.default_rng([job.seed, *job.name.encode()]).normal()
        leave(folder, job, MEANS[job.cell] + 0.03 * job.seed + wobble, ignites=25 if job.cell == "D" else None)
    return folder


def said(folder: Path) -> list[str]:
    return ["".join(p if isinstance(p, str) else p.text for p in s.parts) for s in verdict(load_sweep(folder))]


def test_the_verdict_finds_what_was_put_in_and_says_no_first(tmp_path: Path):
    words = said(fill(tmp_path / "s", decouple()))
    assert any(re.match(r"A \(0\.7.. ± 0\.0..\) is better than floor \(.*\) by \+0\.1.. \[", w) for w in words)
    assert any(
        "C (" in w and "fails the 0.05 gate by a drop of +0.3" in w and "ends below the floor" in w for w in words
    )
    assert any("B (" in w and "remains near A: drop +0.0" in w and "ends above the floor" in w for w in words)
    assert any(w.startswith("anchor.cadence 5 → 20 changes accuracy by −0.4") for w in words)
    assert any(w.startswith("anchor.cadence 5 → 20 does more damage than anchor.delay_k 5 → 20, by 0.3") for w in words)
    assert any("Both together differ from the sum of the two by −0.1" in w for w in words)
    (ignited,) = [w for w in words if "left its baseline" in w]
    assert (
        re.search(r"D length 2[45] \(3 of 3\), entropy (29|30) \(3 of 3\); length led 3", ignited)
        and "A " not in ignited
    )
    goods = [s.good for s in verdict(load_sweep(tmp_path / "s"))]
    assert goods == sorted(goods)


def test_what_noise_can_explain_is_called_not_distinguishable(tmp_path: Path):
    words = said(fill(tmp_path / "s", decouple(), noise=0.5))
    assert any("A (" in w and "are not distinguishable" in w for w in words)
    assert any("The effect of anchor.delay_k 5 → 20 is not distinguishable" in w for w in words)
    assert not any("does more damage than" in w for w in words)


def test_one_seed_gives_numbers_but_no_verdict(tmp_path: Path):
    words = said(fill(tmp_path / "s", decouple(seeds=[0])))
    assert any("are not distinguishable: +0." in w and "(one seed) over 1 seed." in w for w in words)
    assert any("fails the 0.05 gate by a drop of +0.3" in w and "not certain" in w for w in words)


def test_every_number_of_the_verdict_leads_to_a_cell_and_each_cell_to_its_runs(tmp_path: Path):
    folder = fill(tmp_path / "s", decouple())
    write_html([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]*)"', html)
    links = re.findall(r'href="#([^"]*)"', html)
    assert len(ids) == len(set(ids)) and set(links) <= set(ids)
    assert {f"cell-{name}" for name in CELLS} <= set(links) and {f"run-{i}" for i in range(1, 19)} <= set(links)
    verdict_part = html[html.index("<h2>Verdict") : html.index("<h2>Two by two")]
    words = re.sub(r"<a [^>]*>.*?</a>", "", verdict_part)
    loose = re.findall(r"[+−]?0\.\d\d\d", words)
    assert loose == []
    assert (
        html.index("<h2>Verdict") < html.index("<h2>Cells") < html.index("Validation accuracy") < html.index("<h2>Runs")
    )


def test_runs_that_failed_or_stopped_or_were_not_made_are_shown_and_not_counted(tmp_path: Path):
    sweep, folder = decouple(), tmp_path / "s"
    keep_sweep(sweep, folder)
    status = {("A", 1): "failed", ("B", 2): "interrupted"}
    for job in sweep.jobs():
        if (job.cell, job.seed) != ("C", 0):
            leave(folder, job, MEANS[job.cell], status.get((job.cell, job.seed), "completed"))
    words = said(folder)
    assert words[0] == (
        "Not every run has completed, and only completed ones count: A 1 failed; B 1 interrupted; 1 not run."
    )
    table = report_markdown([folder])
    assert (
        "| [A](A) | 0.750 ± 0.000 | 2 of 3 | 1 failed |" in table
        and "| [C](C) | 0.400 ± 0.000 | 2 of 3 | 1 not run |" in table
    )
    assert "PolicyChanged: codec" in table
    write_html([folder], folder / "report.html")
    assert 'class="failed">failed</td>' in (folder / "report.html").read_text()


def test_a_sweep_that_has_not_begun_says_so(tmp_path: Path):
    keep_sweep(decouple(), tmp_path / "s")
    assert said(tmp_path / "s")[0].startswith("Not every run has completed")
    write_html([tmp_path / "s"], tmp_path / "s" / "report.html")
    assert "no runs yet" in (tmp_path / "s" / "report.html").read_text()


def test_of_a_grid_each_arm_is_judged_at_its_own_best_point(tmp_path: Path):
    cells = {"A": CELLS["A"], "floor": CELLS["floor"]}
    sweep = decouple(cells=cells, two_by_two=[], grid={"grpo": {"lr": [1e-5, 3e-5, 1e-4]}})
    keep_sweep(sweep, tmp_path / "s")
    best = {"A": 3e-5, "floor": 1e-4}
    for job in sweep.jobs():
        leave(tmp_path / "s", job, 0.6 + 0.2 * (job.point["grpo.lr"] == best[job.cell]) + job.seed / 100)
    found = load_sweep(tmp_path / "s")
    assert {arm: cell.point["grpo.lr"] for arm, cell in found.tuned.items()} == best
    words = said(tmp_path / "s")
    assert any(
        "A at lr 3e-05 (" in w and "floor at lr 0.0001 (" in w and "not distinguishable: +0.000" in w for w in words
    )
    (edge,) = [w for w in words if "end of the grid" in w]
    assert "floor lr 0.0001" in edge and "A" not in edge.removeprefix("At")
    table = report_markdown([tmp_path / "s"])
    assert "| A − floor | lr 3e-05 | +0.200" in table and "| A − floor | each at its best | +0.000" in table


def test_seeds_that_tune_choose_the_point_and_do_not_judge_it(tmp_path: Path):
    cells = {"A": CELLS["A"], "floor": CELLS["floor"]}
    settings = {"cells": cells, "two_by_two": [], "seeds": [0, 1, 2, 3], "tuning": 1}
    sweep = decouple(**settings, grid={"grpo": {"lr": [1e-5, 3e-5]}})
    keep_sweep(sweep, tmp_path / "s")
    for job in sweep.jobs():  # lucky at one point: what tuning chooses by
        leave(tmp_path / "s", job, 0.9 if job.point["grpo.lr"] == 3e-5 else 0.5)
    best = chosen(tmp_path / "s")
    assert best == {"A": {"grpo.lr": 3e-5}, "floor": {"grpo.lr": 3e-5}}
    for job in sweep.jobs_at(best):
        leave(tmp_path / "s", job, 0.7 if job.cell == "A" else 0.6)
    found = load_sweep(tmp_path / "s")
    assert {arm: cell.values for arm, cell in found.tuned.items()} == {
        "A": {"1": 0.7, "2": 0.7, "3": 0.7}, "floor": {"1": 0.6, "2": 0.6, "3": 0.6}
    }  # fmt: skip
    table = report_markdown([tmp_path / "s"])
    assert "| A − floor | each at its best | +0.100" in table and "| A − floor | lr" not in table
    assert "judged by the others alone" in table and "a little optimistic" not in table


def test_an_arm_that_was_not_tuned_or_only_failed_hinders_no_other(tmp_path: Path):
    """As after `--cells A`; `dense` has run on the whole grid, and nothing of it completed."""
    cells = {name: CELLS[name] for name in ("A", "floor", "dense")}
    sweep = decouple(cells=cells, two_by_two=[], gates={}, seeds=[0, 1], tuning=1, grid={"grpo": {"lr": [1e-5, 3e-5]}})
    keep_sweep(sweep, tmp_path / "s")
    for job in sweep.jobs():
        if job.cell != "floor":
            leave(tmp_path / "s", job, job.point["grpo.lr"] * 1e4, "failed" if job.cell == "dense" else "completed")
    best = chosen(tmp_path / "s")
    assert best == {"A": {"grpo.lr": 3e-5}}
    (job,) = sweep.jobs_at(best)
    leave(tmp_path / "s", job, 0.7)
    assert load_sweep(tmp_path / "s").tuned["A"].values == {"1": 0.7}
    write_html([tmp_path / "s"], tmp_path / "s" / "report.html")
    assert "not run" in report_markdown([tmp_path / "s"])


def test_the_square_is_of_seeds_that_all_four_cells_have(tmp_path: Path):
    folder = fill(tmp_path / "s", decouple(seeds=[0, 1, 2, 3, 4]))
    for seed in (1, 2, 3, 4):
        shutil.rmtree(folder / "D" / f"seed-{seed}")
    found = square(load_sweep(folder), {})
    assert found.second_minus_first.n == found.effects.first.n == 1


def test_a_point_of_the_grid_at_which_runs_fail_is_not_the_best_one(tmp_path: Path):
    sweep = decouple(cells={"A": CELLS["A"]}, two_by_two=[], compare=[], gates={}, grid={"grpo": {"lr": [1e-5, 1e-4]}})
    keep_sweep(sweep, tmp_path / "s")
    for job in sweep.jobs():
        high = job.point["grpo.lr"] == 1e-4
        leave(tmp_path / "s", job, 0.9 if high else 0.6, "failed" if high and job.seed else "completed")
    assert load_sweep(tmp_path / "s").tuned["A"].point == {"grpo.lr": 1e-5}


def test_the_clip_spike_is_the_ratio_of_refreshing_ticks_to_the_others(tmp_path: Path):
    folder = fill(tmp_path / "s", decouple(seeds=[0]))
    with (folder / "A" / "seed-0" / "metrics.jsonl").open("a") as file:
        for tick, (due, share) in enumerate([(0.0, 0.01), (1.0, 0.2), (0.0, 0.03), (1.0, 0.1)]):
            record = {"kind": "tick", "step": tick, "tick": tick, "codec/q_refreshed": due, "actor/pg_clipfrac": share}
            file.write(json.dumps(record) + "\n")
    cells = load_sweep(folder).tuned
    assert cells["A"].clip_spike == pytest.approx(7.5) and cells["dense"].clip_spike is None
    assert "| 7.5× |" in report_markdown([folder])


PUBLISHED = {
    "k5": {25: 0.7263, 50: 0.7362},
    "k20": {25: 0.5921, 50: 0.6482, 75: 0.4898, 100: 0.4435},
    "floor": {50: 0.63},
}


def test_the_published_table_gives_the_published_verdict(tmp_path: Path):
    gates = {"base": "k5", "floor": "floor", "step": 50}
    sweep = Sweep.model_validate(
        {"name": "p", "base": "k5", "seeds": [0], "cells": {k: {} for k in PUBLISHED}, "gates": gates}
    )
    keep_sweep(sweep, tmp_path / "s")
    for job in sweep.jobs():
        leave(tmp_path / "s", job, 0.0)
        records = [{"kind": "val", "step": s, "tick": 2 * s, "accuracy": a} for s, a in PUBLISHED[job.cell].items()]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "s" / job.folder / "metrics.jsonl").write_text(lines)
    (words,) = [w for w in said(tmp_path / "s") if w.startswith("k20")]
    assert words == (
        "k20 (0.444) fails the 0.05 gate by a drop of +0.088 (one seed) against k5 at step 50, not certain over these seeds "
        "and ends below the floor (−0.186 (one seed)), not distinguishable from it."
    )


def test_the_command_on_a_sweep(tmp_path: Path):
    folder = fill(tmp_path / "s", decouple())
    result = CliRunner().invoke(cli.app, ["report", str(folder)])
    assert result.exit_code == 0 and result.stdout == report_markdown([folder]) and (folder / "report.html").exists()
    assert "| [A](A) |" in result.stdout and "main effect, anchor.delay_k 5 → 20" in result.stdout


def test_cells_that_were_diagnosed_have_a_table_of_means_over_seeds(tmp_path: Path):
    folder = fill(tmp_path / "s", decouple())
    write_html([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    assert "gain_length" not in html + report_markdown([folder]) and "Error of the correction" not in html
    for job in decouple().jobs():
        if job.cell in ("A", "floor"):
            values = {"cos_g_comp": 0.1 * job.seed, "gain_length": -0.5}
            values |= {"cos_m_bar": 0.2, "error_drift": 0.3} if job.cell == "A" else {}
            with (folder / job.folder / "metrics.jsonl").open("a") as file:
                for tick, wobble in ((7, -0.1), (14, 0.1)):  # a mean over ticks first
                    found = {f"diagnostics/{k}": v + wobble for k, v in values.items()}
                    file.write(json.dumps({"kind": "tick", "step": tick // 2, "tick": tick} | found) + "\n")
    heading, _, *rows = report_markdown([folder]).partition("| diagnosis |")[2].splitlines()[:5]
    assert heading.split(" | ")[:3] == [" cos_m_bar", "sign_m_bar", "cos_g_comp"]
    assert rows[0].startswith("| [A](A) | 0.200 ± 0.000 | – | 0.100 ± 0.248 | – | – | 0.300 ± 0.000 |")
    assert rows[1].startswith("| [floor](floor) | – | – | 0.100 ± 0.248 |") and rows[2] == ""
    write_html([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    for title in ("<h2>Diagnosis", "Agreement with the true gradient", "Error of the correction", "Predicted gain"):
        assert title in html


def test_a_gate_at_a_step_that_was_not_validated_is_said_and_never_passed(tmp_path: Path):
    ends = {"A": 0.8, "B": 0.6, "floor": 0.2}
    sweep = decouple(
        cells={arm: CELLS[arm] for arm in ends},
        two_by_two=[],
        gates={"base": "A", "floor": "floor", "step": 7, "drop": 0.05},
        seeds=[0, 1, 2],
    )
    keep_sweep(sweep, tmp_path / "s")
    for job in sweep.jobs():
        leave(tmp_path / "s", job, ends[job.cell] + 0.001 * job.seed)
    sentences = {"".join(map(str, s.parts)): s.good for s in verdict(load_sweep(tmp_path / "s"))}
    (b,) = [s for s in sentences if s.startswith("B") and "above the floor" in s]
    assert "is not judged beside A: no validation at step 7 and ends above the floor" in b and not sentences[b]
