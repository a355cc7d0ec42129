"""Runs that diagnose themselves: the same weights to the bit, and numbers that the schedule fixes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import as_if_killed, lines, of_kind, run_kept, small
from tests.ray.test_sweep import measured

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
PREFIX = "diagnostics/"


def found(run: Path) -> dict[int, dict[str, float]]:
    """Metrics of the diagnosed ticks."""
    ticks = {r["tick"]: {k: v for k, v in r.items() if k.startswith(PREFIX)} for r in of_kind(run, "tick")}
    return {t: {k.removeprefix(PREFIX): v for k, v in m.items()} for t, m in ticks.items() if m}


def without(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not k.startswith(PREFIX)} for record in measured(run)]


def test_a_run_is_the_same_to_the_bit_with_and_without_also_on_kept_actors_and_resumed(tmp_path: Path):
    grid = ("swarm.pp=2", "swarm.dp=2", "run.checkpoint_every=3")
    config, other = small(*grid, "diagnostics.every=5"), ("anchor.delay_k=2", "run.seed=4")
    run_kept(small(*grid, *other, "diagnostics.every=3"), tmp_path / "other")
    on = run_kept(config, tmp_path / "on")
    off = run_kept(small(*grid), tmp_path / "off")
    run_kept(
        small("anchor.enabled=false", "merger.kind=none", "run.steps=3", "diagnostics.every=5"), tmp_path / "floor"
    )
    assert on["weights_digests"] == off["weights_digests"] and on["bytes"] == off["bytes"]
    strip = [r for r in without(tmp_path / "on") if r["kind"] != "event"]
    assert strip == [r for r in without(tmp_path / "off") if r["kind"] != "event"]
    assert lines(tmp_path / "on", "corrections.jsonl") == lines(tmp_path / "off", "corrections.jsonl")
    whole = found(tmp_path / "on")
    assert sorted(whole) == [5, 10] and sorted(found(tmp_path / "other")) == [3, 6, 9, 12]
    assert {"cos_m_bar", "cos_merged", "cos_source", "error_noise", "gain_length"} <= set(whole[10])
    assert all(math.isfinite(v) for m in whole.values() for v in m.values())
    (alone,) = found(tmp_path / "floor").values()
    assert "cos_g_comp" in alone and not {"cos_m_bar", "sign_m_bar", "cos_merged", "cos_source"} & set(alone)
    shutil.copytree(tmp_path / "on", tmp_path / "resumed")
    as_if_killed(tmp_path / "resumed", 6)
    again = run_kept(config, tmp_path / "resumed", resume=True)
    assert again["weights_digests"] == off["weights_digests"]
    assert found(tmp_path / "resumed")[10] == whole[10]  # its fire started after the restart


def test_at_delay_and_cadence_one_the_correction_is_exact(tmp_path: Path):
    config = small("anchor.delay_k=1", "anchor.cadence=1", "anchor.beta_anc=0.0", "diagnostics.every=4", "run.steps=4")
    run_kept(config, tmp_path / "run")
    ticks = found(tmp_path / "run")
    assert sorted(ticks) == [4, 8]
    for metrics in ticks.values():
        assert metrics["error_total"] == metrics["error_drift"] == metrics["error_shift"] == 0
        assert metrics["cos_m_bar"] == pytest.approx(1) and metrics["sign_m_bar"] > 0.999


def test_on_the_wall_clock_and_beside_a_placebo(tmp_path: Path):
    run_kept(small("anchor.clock=wall", "diagnostics.every=2", "run.steps=4"), tmp_path / "wall")
    ticks = found(tmp_path / "wall")
    assert sorted(ticks) == [2, 4, 6, 8]
    assert any("cos_source" in metrics for metrics in ticks.values())
    placebo = small("anchor.enabled=false", "merger.placebo=own", "diagnostics.every=4", "run.steps=2")
    summary = run_kept(placebo, tmp_path / "own")
    assert "diagnoser" in summary["peak_memory_gb"]
    for metrics in found(tmp_path / "own").values():
        assert "cos_m_bar" in metrics and "cos_source" not in metrics
    assert json.loads((tmp_path / "own" / "summary.json").read_text())["status"] == "completed"
