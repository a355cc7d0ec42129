"""Fires that replay a window of mini-batches: runs that repeat, resume, and are replayed from a record, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ray.conftest import as_if_killed, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

WINDOW = "anchor.replay=window"
BETWEEN = ("anchor.delay_k=4", "anchor.cadence=3")  # fires start from ticks 2, 5 and 8: checkpoints fall within windows


def test_at_cadence_one_a_window_is_the_mini_batch_and_beyond_it_is_not(tmp_path: Path):
    every = ("anchor.cadence=1", "run.steps=3", "val.every=3")
    window, tick = (run_kept(small(*every, f"anchor.replay={r}"), tmp_path / f"1-{r}") for r in ("window", "tick"))
    assert window["weights_digests"] == tick["weights_digests"] and window["bytes"] == tick["bytes"]
    window, tick = (run_kept(small(f"anchor.replay={r}"), tmp_path / f"2-{r}") for r in ("window", "tick"))
    assert window["weights_digests"] != tick["weights_digests"]
    sent = [run["bytes"]["replay"]["sent"] for run in (window, tick)]
    assert 0.7 < sent[0] / sent[1] < 1.5


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_a_run_resumed_within_a_window_ends_as_one_that_never_stopped(fraction: float, tmp_path: Path):
    config = small(*BETWEEN, WINDOW, f"anchor.replay_fraction={fraction}", "run.checkpoint_every=2")
    whole = run_kept(config, tmp_path / "whole")
    run_kept(config.model_copy(update={"run": config.run.model_copy(update={"steps": 4})}), tmp_path / "parts")
    as_if_killed(tmp_path / "parts", 4)
    assert (tmp_path / "parts" / "checkpoints" / "step-000002" / "window.frame").is_file()
    parts = run_kept(config, tmp_path / "parts", resume=True)
    assert parts["weights_digests"] == whole["weights_digests"]
    assert lines(tmp_path / "parts", "corrections.jsonl") == lines(tmp_path / "whole", "corrections.jsonl")


def test_a_wall_run_that_was_stopped_is_replayed_from_its_record(tmp_path: Path):
    """Fires that were under way when it was stopped are void: their ticks belong to the windows of those after."""
    run, replay = tmp_path / "wall", tmp_path / "replay"
    lag = ("anchor.lag.kind=uniform", "anchor.lag.low=3", "anchor.lag.high=3")
    wall = [*lag, "anchor.clock=wall", "anchor.workers=2", "run.checkpoint_every=3", "run.steps=9", "val.every=9"]
    run_kept(small(*wall, WINDOW), run)
    as_if_killed(run, 9)
    summary = run_kept(small(*wall, WINDOW), run, resume=True)
    assert [r["tick"] for r in of_kind(run, "tick")] == list(range(1, 19))
    merged = [c["first_tick"] for c in lines(run, "corrections.jsonl") if c["first_tick"]]
    assert merged[-1] > 12
    trace = ("anchor.lag.kind=trace", f"anchor.lag.path={run / 'corrections.jsonl'}")
    again = run_kept(small(*trace, WINDOW, "run.steps=9", "val.every=9"), replay)
    assert lines(replay, "corrections.jsonl") == lines(run, "corrections.jsonl")
    assert again["weights_digests"] == summary["weights_digests"]
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


def test_a_diagnosis_knows_what_the_anchor_replayed(tmp_path: Path):
    """Without noise of another sample M_s is M̄, which the anchor sent, to rounding."""
    run = tmp_path / "run"
    config = small(
        WINDOW, "anchor.beta_anc=0.0", "diagnostics.every=4", "anchor.payload=dense", "run.steps=4", "val.every=4"
    )
    run_kept(config, run)
    for record in of_kind(run, "tick"):
        if "diagnostics/cos_source" in record:
            assert record["diagnostics/cos_source"] == pytest.approx(record["diagnostics/cos_m_bar"], abs=1e-4)
