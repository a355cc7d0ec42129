"""Whether the anchor was worth its bytes, on runs and sweeps written here: its share against the bound, and the sentences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from deploy.display.run_display import print_summary
from experiments.anchor_worth import anchor_in_words
from experiments.report import report_markdown, write_html
from experiments.runs import load_run
from experiments.sweep import Sweep, keep_sweep
from tests.unit.experiments.test_sweep_report import leave, said

BYTES = {
    "grad_dp": {"sent": 9.4e6, "dense": 1e8},
    "snapshot": {"sent": 3e6, "dense": 0.0},
    "replay": {"sent": 0.6e6, "dense": 0.0},
    "correction": {"sent": 0.4e6, "dense": 0.0},
}
SPENT = "4 MB of 13.4 MB (30\N{NO-BREAK SPACE}%)"
WITHIN, BEYOND = "within the bound {} that its hold allows", "beyond the bound {} that its hold allows: it may do harm"


def run(folder: Path, ages: list[int | None], config: str = "", sent: Any = BYTES, **metrics: Any) -> Path:
    """A run of one tick for each age, None where nothing was merged; `metrics` of the others, one value or one for each."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('[run]\nname = "r"\nsteps = 9\n' + config)
    merged = [tick for tick, age in enumerate(ages, 1) if age is not None]
    records: list[dict[str, Any]] = [{"kind": "tick", "step": t, "tick": t} for t in range(1, len(ages) + 1)]
    for i, tick in enumerate(merged):
        found = {f"merger/{k}": v[i] if isinstance(v, list) else v for k, v in metrics.items()}
        records[tick - 1] |= {"anchor/age": ages[tick - 1], "anchor/lag": 20, "merger/dose": 1.0} | found
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = {"name": "r", "seed": 0, "status": "completed", "validations": [], "seconds": {}, "wall_s": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary | {"bytes": sent}))
    return folder


def holds(*lengths: int) -> list[int | None]:
    return [age for length in lengths for age in range(length)]


CALIBRATED, SIGNED = '[merger]\nkind = "calibrated"\n', '[merger]\nkind = "signed_ema"\n'


@pytest.mark.parametrize(
    ("ages", "config", "metrics", "says"),
    [
        (holds(20, 20, 20), SIGNED, {}, f"a share of 0.75 of the step, {BEYOND.format(0.2)}"),
        (holds(1, 1, 1), SIGNED, {}, f"a share of 0.75 of the step, {WITHIN.format(4)}"),
        (holds(20, 20), SIGNED + "dose = 0.3\nalpha = 0.5\n", {"dose": 0.3}, f"a share of 0.15 of the step, {WITHIN.format(0.2)}"),
        ([None, *holds(20, 20, 3)], SIGNED + "[anchor]\nbeta_anc = 0.0\n", {}, f"0.75 of the step, {BEYOND.format(0.6)}"),
        ([*holds(4), None, None, *holds(6, 1)], SIGNED, {}, f"0.75 of the step, {WITHIN.format(0.8)}"),
        (holds(6), SIGNED, {}, f"0.75 of the step, {BEYOND.format(0.67)}"),
        (holds(20, 20), CALIBRATED, {"w": 0.05}, f"a share of 0.05 of the step, {WITHIN.format(0.2)}; it would be 0.75, beyond the bound, without the calibration"),
        (holds(2, 2), CALIBRATED, {"w": 0.4, "tau": [2.0, 2.0, 6.0, 6.0]}, f"a share of 0.4 of the step, {WITHIN.format(4)}"),
        (holds(2, 2), CALIBRATED, {"w": [math.nan, 0.0, 0.0, 0.0], "tau": 6.0}, f"a share of 0 of the step, {WITHIN.format(2)}"),
        (holds(2, 2), CALIBRATED, {"w": 12 / 60, "tau": 60.0}, f"a share of 0.2 of the step, {WITHIN.format(0.2)}; it would be 0.75, beyond the bound, without the calibration"),
        (holds(2, 2), CALIBRATED + "cap = 3.0\n", {"w": 0.4, "tau": 6.0}, f"a share of 0.4 of the step, {WITHIN.format(0.5)}; it would be 0.75, beyond the bound, without the calibration"),
        (holds(20, 20), SIGNED + "hold_cap = true\ncap = 60.0\n", {}, f"a share of 0.75 of the step, {WITHIN.format(1)}"),
        ([None, None], SIGNED, {}, "nothing was merged"),
        (holds(5), '[merger]\nkind = "delta"\n', {}, None),
    ],
)  # fmt: skip
def test_a_run_compares_its_share_with_the_bound_of_its_holds(
    tmp_path: Path, ages: list[int | None], config: str, metrics: dict[str, Any], says: str | None
):
    """cap/τ with τ = C(1+β)/(1-β): C = 20 and β = ½ give 12/60 = 0.2; a last hold that nothing followed does not count."""
    words = anchor_in_words(load_run(run(tmp_path / "r", ages, config, **metrics)))
    assert words is not None and words.startswith(SPENT)
    assert words.split("; its noise")[0].endswith(says) if says else words == SPENT


@pytest.mark.parametrize(
    ("w", "tau", "says"), [(0.7, 15.0, "2.9"), (0.2, 60.0, "1.8"), (0.1, 15.0, None), (0.35, 3.0, None)]
)
def test_a_run_says_how_far_its_noise_goes(tmp_path: Path, w: float, tau: float, says: str | None):
    words = anchor_in_words(load_run(run(tmp_path / "r", holds(2, 2), CALIBRATED, w=w, tau=tau))) or ""
    assert (
        words.endswith(f"; its noise goes as far as at {says} times the learning rate")
        if says
        else "noise" not in words
    )


def test_a_run_without_an_anchor_says_nothing_of_it(tmp_path: Path):
    assert anchor_in_words(load_run(run(tmp_path / "r", [None] * 3, sent={"grad_dp": BYTES["grad_dp"]}))) is None
    assert anchor_in_words(load_run(run(tmp_path / "killed", holds(5), sent=None))) is None


def test_the_page_the_table_and_the_summary_of_a_run_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = run(tmp_path / "r", holds(20, 20), CALIBRATED, w=0.05, f=0.9, a=0.04)
    words = anchor_in_words(load_run(one))
    assert f"- anchor: {words}\n" in report_markdown([one])
    write_html([one], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert f'<p class="facts">anchor: {words}</p>' in html and "<h3>Share of the correction</h3>" in html
    print_summary(json.loads((one / "summary.json").read_text()), one)
    assert "a share of 0.05 of the step" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    other = run(tmp_path / "s", holds(20, 20))
    assert "anchor: " not in report_markdown([one, other])


ARMS = {
    "none": {"codec.rank": 4, "anchor.enabled": False, "merger.kind": "none"},
    "helps": {"codec.rank": 4, "merger.kind": "signed_ema", "anchor.delay_k": 1},
    "signed": {"codec.rank": 4, "merger.kind": "signed_ema", "anchor.delay_k": 20},
    "calibrated": {"codec.rank": 4, "merger.kind": "calibrated", "anchor.delay_k": 20},
    "placebo": {"codec.rank": 4, "merger.kind": "signed_ema", "anchor.enabled": False, "merger.placebo": "own"},
    "other-codec": {"codec.rank": 8, "merger.kind": "signed_ema"},
}
MEANS = {"none": 0.6, "helps": 0.7, "signed": 0.4, "calibrated": 0.6, "placebo": 0.65, "other-codec": 0.9}


def fill(folder: Path, **more: Any) -> Path:
    """Arms around their means over seeds; the learning rate is best at the end for those with an anchor."""
    sweep = Sweep.model_validate({"name": "w", "base": "k5", "seeds": [0, 1, 2], "cells": ARMS} | more)
    keep_sweep(sweep, folder)
    for job in sweep.jobs():
        anchored = ARMS[job.cell].get("anchor.enabled", True)
        low = anchored and job.point.get("grpo.lr") == 1e-5
        leave(folder, job, MEANS[job.cell] + 0.03 * job.seed + 0.001 * (job.seed == 1) * anchored - 0.2 * low)
        file = folder / job.folder / "summary.json"
        sent = BYTES if anchored else {"grad_dp": BYTES["grad_dp"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"bytes": sent}))
    return folder


@pytest.mark.parametrize("grid", [{}, {"grpo.lr": [1e-5, 3e-5]}], ids=["one rate", "a grid"])
def test_a_sweep_says_where_the_anchor_was_worth_its_bytes(tmp_path: Path, grid: dict[str, Any]):
    words = [w for w in said(fill(tmp_path / "s", grid=grid)) if w.startswith("The anchor")]
    assert words == [
        "The anchor made no difference that can be told (the interval holds 0, or fewer than 3 seeds): calibrated +0.000 "
        f"[−0.001, +0.002] for {SPENT}, harmful without the calibration.",
        f"The anchor was harmful: signed −0.200 [−0.201, −0.198] for {SPENT}.",
        "The anchor was worth its bytes (gain over the same codec without one, each at its best): helps +0.100 "
        f"[+0.099, +0.102] for {SPENT}.",
    ]


def test_two_seeds_are_no_verdict_on_the_anchor(tmp_path: Path):
    words = [w for w in said(fill(tmp_path / "s", seeds=[0, 1])) if w.startswith("The anchor")]
    assert len(words) == 1 and words[0].startswith("The anchor made no difference") and "helps" in words[0]


def test_an_arm_whose_tables_are_renewed_at_the_anchors_cadence_is_no_other_arm_without_one(tmp_path: Path):
    """Else what the tables do is taken for what the anchor does."""
    codec, no_codec = {"codec.kind": "powersgd", "codec.rank": 4}, {"codec.kind": "none"}
    without = {"anchor.enabled": False, "anchor.cadence": 5, "merger.kind": "none"}
    twenty = {"anchor.delay_k": 20, "anchor.cadence": 20, "merger.kind": "signed_ema"}
    arms = {
        "none": codec | without,
        "rarely": codec | twenty,
        "as-often": codec | twenty | {"codec.q_cadence": 5},
        "dense": no_codec | without,
        "dense-rarely": no_codec | twenty,
    }
    sweep = Sweep.model_validate({"name": "w", "base": "k5", "seeds": [0, 1, 2], "cells": arms})
    keep_sweep(sweep, tmp_path / "s")
    for job in sweep.jobs():
        ends = {"none": 0.6, "rarely": 0.2, "as-often": 0.7}.get(job.cell, 0.8 if "rarely" in job.cell else 0.5)
        leave(tmp_path / "s", job, ends + 0.001 * job.seed)
        if arms[job.cell].get("anchor.enabled", True):
            file = tmp_path / "s" / job.folder / "summary.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"bytes": BYTES}))
    words = " ".join(w for w in said(tmp_path / "s") if w.startswith("The anchor"))
    assert "as-often +0.100" in words and "dense-rarely +0.300" in words and "; rarely" not in words
