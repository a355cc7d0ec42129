"""The launch gate in whole runs: a lossy codec is refused at the second step, or only remarked on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cluster.launch import drive
from rl.mismatch import NAMES
from swarm.gate import EngineMismatch, PolicyChanged
from tests.ray.conftest import ignore, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ALONE = ("anchor.enabled=false", "merger.kind=none", "run.steps=3", "val.every=9")
CAPPED = (ALONE[0], "merger.placebo=own", "merger.hold_cap=true", "merger.cap=1.0", "val.every=9")


# tables are refreshed before tick 2 and every `cadence` ticks; the second step begins with tick 3
@pytest.mark.parametrize(
    ("old", "cadence", "ticks"), [("trainer", 2, 3), ("trainer", 3, 2), ("tick", 3, 3), ("rollout", 3, 3)]
)
def test_a_codec_that_changes_the_policy_stops_the_run_at_its_second_step(
    tmp_path: Path, old: str, cadence: int, ticks: int
):
    """Before the step's first tick where log-probs are recomputed, else as soon as that tick has measured it."""
    config = small(*ALONE, "codec.max_kl=0.001", f"codec.q_cadence={cadence}", f"grpo.old_logprobs={old}")
    with pytest.raises(PolicyChanged, match=r"codec\.max_kl 0\.001.*northstar probe") as caught:
        drive(config, tmp_path / "run", ignore)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "PolicyChanged" in summary["error"]
    assert summary["steps"] == 2 and summary["ticks"] == ticks
    assert caught.value.kl > 0.001


@pytest.mark.parametrize("old", ["trainer", "tick", "rollout"])
def test_without_a_limit_the_run_goes_on_and_says_so_once(tmp_path: Path, old: str):
    run_kept(small(*ALONE, f"grpo.old_logprobs={old}"), tmp_path / "run")
    (event,) = [e for e in of_kind(tmp_path / "run", "event") if e["event"] == "codec changes the policy"]
    steps = of_kind(tmp_path / "run", "step")
    assert event["step"] == 2 and event["codec/logprob_kl"] == steps[1]["codec/logprob_kl"] > 0.02
    assert all(set(NAMES) <= set(step) for step in steps)
    assert all(step["codec/logprob_kl"] == step["rollout_corr/kl"] for step in steps)
    assert not [name for step in steps for name in step if name.startswith("mismatch/")]


def test_without_a_codec_the_two_policies_agree_and_nothing_is_said(tmp_path: Path):
    """Only that a share is capped, which is known before the first tick."""
    run_kept(small(*CAPPED, "codec.kind=none", "codec.max_kl=0.001", "run.steps=2"), tmp_path / "run")
    events = {e["event"]: e for e in of_kind(tmp_path / "run", "event")}
    assert not {"codec changes the policy", CUT} & set(events)
    capped = events["share of the correction is capped"]
    assert capped["tick"] == 0 and capped["share"] == 0.75 > capped["cap"] and "merger.hold_cap" in capped["reason"]
    (_, step) = of_kind(tmp_path / "run", "step")
    assert abs(step["codec/logprob_kl"]) < 1e-5 and step["codec/logprob_corr"] > 0.99999
    assert step["codec/ratio_outside_1.2"] == 0


CUT = "every answer was cut at grpo.max_response_length"


def test_steps_in_which_no_answer_ends_are_remarked_on_once(tmp_path: Path):
    run_kept(small(*ALONE, "grpo.max_response_length=2"), tmp_path / "run")
    assert [step["response_length/clip_ratio"] for step in of_kind(tmp_path / "run", "step")] == [1, 1, 1]
    (event,) = [e for e in of_kind(tmp_path / "run", "event") if e["event"] == CUT]
    assert event["step"] == 1 and event["limit"] == 2 and "generation_config.json" in event["fix"]


def test_an_engine_that_differs_from_the_model_stops_the_run_before_its_first_tick(tmp_path: Path):
    """In bf16 a cached decode rounds otherwise than a whole forward; the limit here is below any rounding."""
    config = small(*ALONE, "model.dtype=bfloat16", "rollout.max_mismatch_kl=1e-9")
    with pytest.raises(EngineMismatch, match=r"rollout\.max_mismatch_kl 1e-09"):
        drive(config, tmp_path / "run", ignore)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["ticks"] == 0
