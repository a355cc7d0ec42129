"""Where bytes and seconds went: on run folders written here, sums hold, nothing is counted twice, runs stand side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from codec.ledger import CHANNELS
from experiments.drawing import in_bytes
from experiments.plots import curves
from experiments.report import report_markdown, write_html
from experiments.runs import load_run, load_runs
from experiments.spending import EVERYTHING, REST, channel_table, seconds_of, traffic_of
from tests.unit.experiments.test_report import write_run

TICK = {"timing_s/tick": 0.3, "timing_s/forward_backward": 0.2, "timing_s/reduce": 0.05, "timing_s/diagnostics": 0.1}


def with_seconds(folder: Path, **phases: float) -> Path:
    """Every step of the run took so long; `phases` without `timing_s/`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = {f"timing_s/{name}": value for name, value in phases.items()}
    lines = [line | (own if line["kind"] == "step" else {}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_all_channels_together_come_first_and_the_others_in_the_order_of_the_ledger(tmp_path: Path):
    sent = {channel: {"sent": 1e6 * (i + 1), "dense": 2e6} for i, channel in enumerate(reversed(CHANNELS))}
    found = traffic_of(load_run(write_run(tmp_path / "a", bytes=sent)))
    assert list(found) == [EVERYTHING, *CHANNELS]
    assert found[EVERYTHING].sent == sum(entry["sent"] for entry in sent.values())
    assert found[EVERYTHING].dense == sum(entry["dense"] for entry in sent.values())
    assert traffic_of(load_run(write_run(tmp_path / "b", status=None))) == {}


def test_the_phases_and_the_rest_come_to_the_step_and_a_diagnosis_counts_once(tmp_path: Path):
    folder = write_run(tmp_path / "a", tick=TICK)
    phases = {"step": 1.2, "gen": 0.3, "ticks": 0.6, "diagnostics": 0.2}
    found = seconds_of(load_run(with_seconds(folder, **phases)))
    assert {name: found[name] for name in phases} == pytest.approx(phases)
    assert found[REST] == pytest.approx(1.2 - 0.3 - 0.6 - 0.2)
    ticks = {name: value for name, value in found.items() if name.startswith("ticks: ")}
    assert ticks == pytest.approx({"ticks: forward_backward": 0.4, "ticks: reduce": 0.1})  # two ticks a step


def test_phases_that_overlap_leave_no_rest(tmp_path: Path):
    found = seconds_of(load_run(with_seconds(write_run(tmp_path / "a"), step=0.7, gen=0.5, ticks=0.6)))
    assert REST not in found and found["gen"] == pytest.approx(0.5)
    assert seconds_of(load_run(write_run(tmp_path / "b", steps=0, status="failed"))) == {}


def test_a_phase_of_some_steps_is_spread_over_all(tmp_path: Path):
    folder = with_seconds(write_run(tmp_path / "a"), step=1.0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"kind": "step"' in line)
    lines[first] = json.dumps(json.loads(lines[first]) | {"timing_s/sync": 0.8})
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert seconds_of(load_run(folder))["sync"] == pytest.approx(0.8 / 4)


def test_before_and_after_stand_side_by_side(tmp_path: Path):
    before = write_run(tmp_path / "a", "before", bytes={"grad_dp": {"sent": 4e8, "dense": 4e8}})
    after = {"boundary_fwd": {"sent": 1e6, "dense": 1e8}, "grad_dp": {"sent": 3e6, "dense": 4e8}}
    folders = [before, write_run(tmp_path / "b", "after", bytes=after)]
    table = report_markdown(folders)
    assert "| MB sent, of dense | before, seed 0 | after, seed 0 |" in table
    assert "| everything | 400.00 of 400.00 (ratio 1.0000) | 4.00 of 500.00 (ratio 0.0080) |" in table
    assert "| boundary_fwd | – | 1.00 of 100.00 (25.0\N{NO-BREAK SPACE}%) |" in table
    assert (
        "| grad_dp | 400.00 of 400.00 (100.0\N{NO-BREAK SPACE}%) | 3.00 of 400.00 (75.0\N{NO-BREAK SPACE}%) |" in table
    )
    write_html(folders, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    part = html[html.index("<h2>Where bytes and seconds go") :]
    assert part.count("<h3>Bytes by channel") == 1 and "3 MB of 400 MB" in part and "400 MB of 400 MB" in part


def test_seeds_of_one_experiment_are_their_mean(tmp_path: Path):
    for seed, sent in enumerate((1e6, 3e6)):
        write_run(tmp_path / f"s{seed}", seed=seed, bytes={"grad_dp": {"sent": sent, "dense": 8e6}})
    (curve,) = curves(load_runs([tmp_path]))
    assert channel_table([curve]).rows[1] == ["grad_dp", "2.00 of 8.00 (100.0\N{NO-BREAK SPACE}%)"]


def test_a_run_without_seconds_and_bytes_has_no_tables(tmp_path: Path):
    table = report_markdown([write_run(tmp_path / "a", bytes={})])
    assert "MB sent" not in table and "seconds of a step" not in table


@pytest.mark.parametrize(
    ("nbytes", "says"), [(0, "0 B"), (999.7, "1 kB"), (999_600, "1 MB"), (3.568e6, "3.57 MB"), (1.867e9, "1.87 GB")]
)
def test_sizes_have_a_unit_and_no_exponent(nbytes: float, says: str):
    assert in_bytes(nbytes) == says
