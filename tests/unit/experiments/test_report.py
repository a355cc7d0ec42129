"""The report, on run folders written here: what it must show, what it must refuse to make up, what must not break it."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from deploy import cli
from deploy.cluster import launch
from experiments.plots import curves
from experiments.report import report_markdown, write_html
from experiments.runs import load_runs

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
ANCHOR = {"anchor/lag": 5.0, "anchor/age": 0.0, "anchor/backwards": 1, "codec/q_refreshed": 1.0}
BYTES = {"boundary_fwd": {"sent": 5e6, "dense": 1e8}, "snapshot": {"sent": 2e7, "dense": 0.0}}


def write_run(
    folder: Path, name: str = "k5", seed: int = 0, status: str | None = "completed", steps: int = 4, **more: Any
) -> Path:
    """A run folder as the telemetry leaves it. `more`: `tick` metrics, `config` lines, other keys of the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    tick, config = more.pop("tick", ANCHOR), more.pop("config", "")
    (folder / "config.toml").write_text(f'[run]\nname = "{name}"\nseed = {seed}\nsteps = 4\n{config}')
    records = [{"kind": "event", "step": 0, "tick": 0, "event": "started"}]
    records += [{"kind": "val", "step": 0, "tick": 0, "accuracy": 0.25}] if steps else []
    for s in range(1, steps + 1):
        clip = {"actor/pg_clipfrac": 0.01 * (s + seed)}
        records += [{"kind": "tick", "step": s, "tick": t, **clip, **tick} for t in (2 * s - 1, 2 * s)]
        reward = {"critic/rewards/mean": 0.3 + seed / 10, "response_length/mean": 11.0, "actor/entropy": 0.5 / s}
        records += [{"kind": "step", "step": s, "tick": 2 * s, **reward}]
    records += [{"kind": "val", "step": s, "tick": 2 * s, "accuracy": 0.5 + seed / 10} for s in [steps] if s == 4]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if status:
        accuracies = [r["accuracy"] for r in records if r["kind"] == "val"] or [None]
        summary = {"name": name, "seed": seed, "status": status, "steps": steps, "anchor_backwards": 3, "bytes": BYTES}
        summary |= {"val_start": accuracies[0], "val_end": accuracies[-1], "wall_s": 39.26, "error": None}
        summary |= {"comm/bytes_ratio": 0.0502, "comm/total_ratio": 0.7966}
        (folder / "summary.json").write_text(json.dumps(summary | more))
    return folder


def page(folders: list[Path], tmp_path: Path) -> str:
    out = tmp_path / "page" / "report.html"
    write_html(folders, out)
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]  # the temporary name is gone
    text = out.read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert ElementTree.fromstring(svg).tag == f"{{{SVG_NAMESPACE}}}svg"
    return text


def titles(html: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", html)


def rows(html: str) -> list[list[str]]:
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<td data-label=[^>]*>(.*?)</td>", row) for row in found if "data-label" in row]


def test_every_run_is_in_the_tables(tmp_path: Path):
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", "dense", 3, tick={}),
        write_run(tmp_path / "c", "k20", 1, "interrupted", steps=2),
        write_run(tmp_path / "d", "floor", 2, "failed", steps=1, error="WorkerDied: worker d1p0"),
    ]
    html, table = page(folders, tmp_path), report_markdown(folders)
    numbers = ["3", "0.7966", "0.0502", "39.3"]
    expected = [
        ["k5", "0", "completed", "0.250 → 0.500", "4", *numbers],
        ["dense", "3", "completed", "0.250 → 0.800", "4", *numbers],
        ["k20", "1", "interrupted", "0.250 → 0.250", "2 of 4", *numbers],
        ["floor", "2", "failed", "0.250 → 0.250", "1 of 4", *numbers],
    ]
    assert rows(html) == expected
    lines = table.splitlines()
    assert [line.strip("| ").split(" | ") for line in lines[2:6]] == expected
    assert "WorkerDied: worker d1p0" in html and "WorkerDied: worker d1p0" in table
    assert "4 runs" in html and "2 completed" in html and "1 interrupted" in html and "1 failed" in html
    assert html.count("<details>") == 4


def test_a_page_about_one_run_has_every_figure(tmp_path: Path):
    html = page([write_run(tmp_path / "a")], tmp_path)
    assert titles(html) == [
        "Validation accuracy",
        "Reward",
        "Response length",
        "Entropy",
        "Lag and age",
        "Clipped share",
        "Bytes by channel",
    ]
    assert "<h1>k5</h1>" in html and "5 MB of 100 MB" in html and "snapshot" in html and "total_ratio 0.7966" in html


def test_what_was_not_recorded_is_not_drawn(tmp_path: Path):
    html = page([write_run(tmp_path / "a", tick={}, bytes=None)], tmp_path)
    assert "Lag and age" not in titles(html) and "Bytes by channel" not in html
    assert "refreshed Q" not in html
    with_age = page([write_run(tmp_path / "b", tick={"anchor/age": 1.0})], tmp_path / "2")
    figure = with_age[with_age.index("Lag and age") :]
    assert ">age</text>" in figure and ">lag</text>" not in figure


def test_only_completed_seeds_of_one_experiment_are_pooled(tmp_path: Path):
    folders = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in range(3)]
    folders += [write_run(tmp_path / "again", seed=0)]  # the same seed a second time says nothing about spread
    folders += [write_run(tmp_path / "stopped", seed=3, status="interrupted", steps=2)]
    folders += [write_run(tmp_path / "dose", seed=4, config="[merger]\ndose = 0.5\n")]
    folders += [write_run(tmp_path / "other", "k20", seed=5)]
    found = curves(load_runs(folders))
    assert [(c.label, len(c.runs), c.stopped) for c in found] == [
        ("k5, 3 seeds", 3, False),
        ("k5, seed 0", 1, False),
        ("k5, seed 3, interrupted", 1, True),
        ("k5, seed 4", 1, False),
        ("k20, seed 5", 1, False),
    ]
    assert len({(c.color, c.marker) for c in found}) == 3  # by experiment
    band = "smallest to the largest"
    assert band in page(folders, tmp_path) and band not in page(folders[3:], tmp_path / "2")


def test_the_band_spans_the_seeds_and_the_line_is_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, list] = {"line": [], "band": []}
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **style: drawn["line"].append(list(y)))
    monkeypatch.setattr(
        "matplotlib.axes.Axes.fill_between",
        lambda self, x, low, high, **style: drawn["band"].append((list(low), list(high))),
    )
    page([write_run(tmp_path / "a", seed=0), write_run(tmp_path / "b", seed=1)], tmp_path)
    assert drawn["line"][0] == pytest.approx([0.25, 0.55])
    low, high = drawn["band"][0]
    assert low == pytest.approx([0.25, 0.5]) and high == pytest.approx([0.25, 0.6])


def test_runs_that_look_alike_are_told_apart_by_their_folder(tmp_path: Path):
    html = page([write_run(tmp_path / "first"), write_run(tmp_path / "second")], tmp_path)
    assert "k5, seed 0 (first)" in html and "k5, seed 0 (second)" in html


def test_text_of_a_run_is_never_markup(tmp_path: Path):
    bad = "<script>alert(1)</script>"
    folder = write_run(tmp_path / "a", config=f"# {bad}\n", name="k5")
    summary = json.loads((folder / "summary.json").read_text()) | {"name": bad, "error": bad, "status": f'"{bad}'}
    (folder / "summary.json").write_text(json.dumps(summary))
    second = write_run(tmp_path / "b", "k20", config=f"# {bad}\n")
    html = page([folder, second], tmp_path)
    assert "<script" not in html and html.count("&lt;script&gt;") >= 5
    assert "<script" not in report_markdown([folder, second])
    (folder / "summary.json").write_text(json.dumps(summary | {"name": "a | b\nc"}))
    assert "| a \\| b c | 0 |" in report_markdown([folder])


def test_the_page_is_self_contained(tmp_path: Path):
    html = page([write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)], tmp_path)
    assert set(re.findall(r"https?://[^\s\"'<)]*", html)) == {SVG_NAMESPACE}
    assert not re.search(r"<(script|link|img|iframe|object)\b", html) and "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_what_each_set_came_to_is_a_table_of_the_page_and_of_the_terminal(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    assert "Validation by set" not in page([folder], tmp_path)
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    named = [r | ({"sets": {"held<b>": 0.125, "held/gsm": r["step"] / 8}} if r["kind"] == "val" else {}) for r in lines]
    file.write_text("".join(json.dumps(record) + "\n" for record in named))
    html = page([folder], tmp_path)
    assert "Validation by set" in html and '<th scope="row">held&lt;b&gt;</th><td>0.125</td><td>0.125</td>' in html
    words = report_markdown([folder])
    assert "| validation of k5, seed 0 | @0 | @4 |" in words and "| held/gsm | 0.000 | 0.500 |" in words
    assert "| the task's own | 0.250 | 0.500 |" in words


def test_the_same_runs_give_the_same_page(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    assert page([folder], tmp_path) == page([folder], tmp_path)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_stopped_before_its_first_validation(tmp_path: Path, status: str):
    folder = write_run(tmp_path / "a", status=status, steps=0)
    summary = {"name": "k5", "seed": 0, "status": status, "val_start": None, "val_end": None, "wall_s": 1.5}
    (folder / "summary.json").write_text(json.dumps(summary | {"validations": [], "error": None}))
    html = page([folder], tmp_path)
    assert rows(html) == [["k5", "0", status, "–", "0 of 4", "–", "–", "–", "1.5"]]
    assert "<svg" not in html
    assert page([folder, write_run(tmp_path / "b", "k20")], tmp_path / "2").count("<svg") == 7


def test_a_killed_run_is_read_from_what_it_recorded(tmp_path: Path):
    folder = write_run(tmp_path / "a", status=None, steps=3, tick=ANCHOR | {"comm/total_ratio": 0.6})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tick", "st')
    html = page([folder], tmp_path)
    assert rows(html) == [["k5", "0", "unfinished", "0.250 → 0.250", "3 of 4", "1", "0.6000", "–", "–"]]
    assert "no summary.json" in html and "cannot be read, left out: 1" in html


def test_empty_and_broken_folders(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    broken = write_run(tmp_path / "broken")
    (broken / "summary.json").write_text("{")
    (broken / "config.toml").write_text("no = toml = at all")
    (broken / "metrics.jsonl").write_text("[1, 2]\nnull\n\n")
    html = page([tmp_path / "empty", broken], tmp_path)
    assert [row[0] for row in rows(html)] == ["empty", "broken"] and "no = toml = at all" in html
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report_markdown([tmp_path / "nowhere"])


def test_a_run_that_diverged_leaves_gaps(tmp_path: Path):
    folder = write_run(tmp_path / "a", tick={"anchor/lag": math.nan, "anchor/age": math.inf}, val_end=math.nan)
    assert "0.250 → –" in page([folder], tmp_path)


def test_a_resumed_run_says_from_where_its_time_counts(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "event": "started", "step": 2, "tick": 4}) + "\n")
    assert "resumed at step 2" in report_markdown([folder])


def test_a_folder_of_runs_stands_for_the_runs(tmp_path: Path):
    for seed in range(2):
        write_run(tmp_path / "sweep" / f"s{seed}", seed=seed)
    assert report_markdown([tmp_path / "sweep"]).count("| k5 |") == 2
    assert (
        report_markdown([tmp_path / "sweep", tmp_path / "sweep" / "s0"]).count("| k5 |") == 2
    )  # named twice, shown once


def test_the_command(tmp_path: Path):
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", "k20")
    result = CliRunner().invoke(cli.app, ["report", str(one)])
    assert result.exit_code == 0 and result.stdout == report_markdown([one]) and (one / "report.html").exists()
    assert CliRunner().invoke(cli.app, ["report", str(one), str(two)]).exit_code == 0
    assert (tmp_path / "report.html").exists()
    chosen = tmp_path / "new" / "x.html"
    assert CliRunner().invoke(cli.app, ["report", str(one), "--html", str(chosen)]).exit_code == 0 and chosen.exists()
    assert CliRunner().invoke(cli.app, ["report", str(tmp_path / "nowhere")]).exit_code == 2
    table = tmp_path / "data" / "runs.csv"
    assert CliRunner().invoke(cli.app, ["report", str(one), str(two), "--csv", str(table)]).exit_code == 0
    rows = list(csv.DictReader(table.open()))
    runs = load_runs([one, two])
    assert [(r["run"], r["seed"], r["status"]) for r in rows] == [(r.name, r.seed, r.status) for r in runs]
    last = max((c for c in rows[0] if c.startswith("val@")), key=lambda c: int(c[4:]))
    assert float(rows[0][last]) == pytest.approx(runs[0].summary["val_end"], abs=1e-4)


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("interrupted", 130), ("failed", 1)])
def test_a_run_leaves_its_page_whatever_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status, code):
    def execute(config: Any, folder: Path, *_: Any) -> dict[str, Any]:
        write_run(folder, status=status, validations=[], seconds={})
        if status == "failed":
            raise RuntimeError("no luck")
        return json.loads((folder / "summary.json").read_text())

    monkeypatch.setattr(launch, "execute", execute)
    result = CliRunner().invoke(cli.app, ["run", "demo", "--out", str(tmp_path / "run")])
    assert result.exit_code == code
    assert f'class="{status}">{status}</td>' in (tmp_path / "run" / "report.html").read_text()


def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def execute(config: Any, folder: Path, *_: Any) -> dict[str, Any]:
        write_run(folder, validations=[], seconds={})
        (folder / "report.html").mkdir()
        return json.loads((folder / "summary.json").read_text())

    monkeypatch.setattr(launch, "execute", execute)
    result = CliRunner().invoke(cli.app, ["run", "demo", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0 and "report.html was not written" in result.stderr


def test_no_two_lines_of_a_picture_have_one_colour(tmp_path: Path):
    html = page([write_run(tmp_path / str(i), f"cell{i}") for i in range(7)], tmp_path)
    keys = [
        re.findall(r'<i style="color: (#\w+)"', key) for key in re.findall(r'<ul class="key">(.*?)</ul>', html, re.S)
    ]
    assert [len(key) for key in keys] == [4, 3, 4, 3]  # lines, then bytes
    assert all(len(set(key)) == len(key) for key in keys)
    drawn = [part.count("Validation accuracy") for part in html.split('<ul class="key">')]
    assert drawn == [0, 1, 1, 0, 0]
