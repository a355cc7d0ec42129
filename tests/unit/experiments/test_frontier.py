"""Accuracy against bytes, on sweeps written here: which total is called the smallest, and how sure that is said to be."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments import frontier as module
from experiments.cells import chosen, load_sweep
from experiments.frontier import Frontier, frontier, frontier_picture
from experiments.report import report_markdown, write_html
from experiments.sweep import Job, Sweep, keep_sweep
from experiments.verdict import verdict
from tests.unit.experiments.test_sweep_report import leave

Arms = dict[str, tuple[float, float]]  # total_ratio and accuracy
ARMS: Arms = {"dense": (1.1, 0.78), "ample": (0.2, 0.779), "half": (0.04, 0.775), "eighth": (0.01, 0.6)}


def make(folder: Path, arms: Arms = ARMS, noise: float = 0.0005, seeds: Sequence[int] = (0, 1, 2), **more: Any) -> Path:
    """Every run around its arm's accuracy. What is common to a seed is far larger than the noise, which is the base's
    difference to any other: over three seeds an interval of 2.48 times the noise to either side."""
    data = {"name": "try", "base": "k5", "seeds": list(seeds), "gates": {"base": "dense", "drop": 0.01}}
    sweep = Sweep.model_validate(data | {"cells": {arm: {} for arm in arms}} | more)
    keep_sweep(sweep, folder)
    for job in sweep.jobs():
        run(folder, job, *arms[job.cell], noise)
    if sweep.tuning:
        for job in sweep.jobs_at(chosen(folder)):
            run(folder, job, *arms[job.cell], noise)
    return folder


def run(folder: Path, job: Job, ratio: float, accuracy: float, noise: float) -> None:
    wobble = 0.0 if job.cell == "dense" else noise * (job.seed % 3 - 1)
    best = 0.0 if job.point.get("grpo.lr", 2e-4) == 2e-4 else 0.1
    leave(folder, job, accuracy + 0.05 * job.seed + wobble - best)
    file = folder / job.folder / "summary.json"
    sent = {"grad_dp": {"sent": 1e8 * ratio, "dense": 1e8}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"comm/total_ratio": ratio, "bytes": sent}))


def read(folder: Path) -> Frontier:
    found = frontier(load_sweep(folder))
    assert found
    return found


def said(folder: Path) -> list[str]:
    return ["".join(p if isinstance(p, str) else p.text for p in s.parts) for s in verdict(load_sweep(folder))]


def test_the_smallest_total_near_the_base_is_found_within_seeds(tmp_path: Path):
    words = said(make(tmp_path / "s"))
    (smallest,) = [w for w in words if w.startswith("The smallest")]
    assert smallest.startswith("The smallest total_ratio within 0.01 of dense: half at 0.0400 (difference −0.005 [")
    assert smallest.endswith("]).")  # certain, though seeds differ by 0.05
    assert not any("No cell that sends less" in w for w in words)


def test_what_cannot_be_told_from_the_base_comes_first_and_doubt_is_said(tmp_path: Path):
    found = verdict(load_sweep(make(tmp_path / "s", noise=0.004)))
    words = said(tmp_path / "s")
    alike = next(i for i, w in enumerate(words) if w.startswith("Send less than dense and cannot be told from it"))
    smallest = next(i for i, w in enumerate(words) if w.startswith("The smallest total_ratio"))
    assert alike == 0 < smallest and "ample" in words[0] and "eighth" not in words[0]
    assert words[smallest].endswith("not certain over these seeds.") and not found[smallest].good


def test_where_the_smallest_is_doubtful_the_smallest_certain_one_is_named_too(tmp_path: Path):
    arms = ARMS | {"half": (0.04, 0.7705), "ample": (0.2, 0.78)}
    words = said(make(tmp_path / "s", arms))
    assert any(w.startswith("The smallest total_ratio within 0.01 of dense: half at 0.0400") for w in words)
    assert any(w.startswith("The smallest for which that is certain over these seeds: ample at 0.2000") for w in words)


def test_without_one_near_the_base_the_nearest_is_named(tmp_path: Path):
    words = said(make(tmp_path / "s", {"dense": (1.0, 0.8), "half": (0.5, 0.7), "eighth": (0.1, 0.6)}))
    (no,) = [w for w in words if w.startswith("No cell that sends less than dense is within 0.01 of it")]
    assert "; the nearest is half, by −0.100 [−0.101, −0.099]." in no
    assert all(words)


def test_a_cell_that_sends_more_than_the_base_is_never_the_smallest(tmp_path: Path):
    folder = make(tmp_path / "s", {"dense": (0.5, 0.8), "anchored": (1.0, 0.8)})
    assert not any("smallest" in w for w in said(folder))


@pytest.mark.parametrize(
    ("ratios", "shown"), [((1.0, 0.7), False), ((1.5, 1.0), False), ((1.6, 1.0), True), ((0.05, 1.0), True)]
)
def test_a_frontier_is_shown_where_totals_differ(tmp_path: Path, ratios: tuple[float, float], shown: bool):
    folder = make(tmp_path / "s", {arm: (ratio, 0.7) for arm, ratio in zip(("dense", "other"), ratios)})
    write_html([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    assert ("<h2>Accuracy against bytes" in html) == shown == ("| MB sent |" in report_markdown([folder]))


def test_runs_that_did_not_complete_or_have_no_ratio_are_left_out(tmp_path: Path):
    folder = make(tmp_path / "s")
    for seed in range(3):
        file = folder / "half" / f"seed-{seed}" / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "failed"}))
        file = folder / "ample" / f"seed-{seed}" / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"comm/total_ratio": None}))
    assert [spot.cell.arm for spot in read(folder).spots] == ["eighth", "dense"]


def test_each_arm_stands_at_its_own_point_and_is_judged_by_the_later_seeds(tmp_path: Path):
    grid = {"seeds": [3, 4, 5, 6], "tuning": 1, "grid": {"grpo": {"lr": [1e-4, 2e-4]}}}
    folder = make(tmp_path / "s", **grid)
    found = read(folder)
    assert {spot.cell.point["grpo.lr"] for spot in found.spots} == {2e-4}
    assert {spot.difference.n for spot in found.spots} == {3}
    heading, _, first = report_markdown([folder]).partition("| cell | lr | total_ratio |")[2].splitlines()[:3]
    assert heading == " MB sent | val accuracy | difference to dense | seeds | within 0.01 |"
    assert first.startswith("| [eighth](eighth-lr_0.0002) | 0.0002 | 0.0100 | 1.00 | ") and first.endswith("| 3 | no |")
    write_html([folder], folder / "report.html")
    assert 'href="#cell-eighth-lr_0.0002"' in (folder / "report.html").read_text()


def test_without_a_base_there_is_a_picture_and_no_judgement(tmp_path: Path):
    folder = make(tmp_path / "s", gates={})
    found = read(folder)
    assert found.base is None and not any("smallest" in w for w in said(folder))
    assert "Grey" not in frontier_picture(found).note
    assert "| MB sent | val accuracy |\n" in report_markdown([folder])


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_what_nothing_with_fewer_bytes_equals(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    arms = {f"c{i}": (float(rng.uniform(0.01, 1)), float(rng.uniform(0.6, 0.8))) for i in range(9)}
    found = read(make(tmp_path / "s", arms, gates={}, seeds=[1]))
    points = [(spot.ratio, spot.cell.mean.mean) for spot in found.spots]
    slow = [p for p in points if not any(q[0] < p[0] and q[1] >= p[1] for q in points)]
    assert [(spot.ratio, spot.cell.mean.mean) for spot in found.best] == slow


def test_no_name_lies_on_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A dozen cells in a heap, as cells of nearly equal bytes and accuracies are."""
    near = {f"powersgd-r{i}": (0.04 + 0.0015 * i, 0.78 + 0.001 * (i % 3)) for i in range(10)}
    drawn: list[Callable[[Figure], None]] = []
    monkeypatch.setattr(module, "as_svg", lambda key, draw, *size: drawn.append(draw) or "")
    frontier_picture(read(make(tmp_path / "s", ARMS | near)))
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        figure = Figure(figsize=(module.WIDTH, module.HEIGHT))
        drawn[0](figure)
        figure.draw_without_rendering()
    (axis,) = figure.axes
    assert {text.get_text() for text in axis.texts} == set(ARMS | near)
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the lines that lead to their points
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    whole = axis.get_window_extent()
    assert all(whole.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
