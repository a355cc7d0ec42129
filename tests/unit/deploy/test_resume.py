"""A stopped run goes on as the experiment that it was, or is told what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.cluster import launch
from deploy.config import ConfigError, load, to_toml
from deploy.resume import Resume, check_resumes
from swarm import scale


def test_a_run_goes_on_as_the_experiment_that_it_was(tmp_path: Path):
    stored = tmp_path / "config.toml"
    stored.write_text(to_toml(load("k5")))
    check_resumes(stored, load("k5", ["run.steps=90", "swarm.timeout_s=7", "rollout.replicas=2", "links.swarm_mbit=3"]))
    with pytest.raises(ConfigError, match=r"grpo\.lr 6e-05 -> 0\.01, run\.seed 0 -> 9"):
        check_resumes(stored, load("k5", ["grpo.lr=1e-2", "run.seed=9"]))


@pytest.mark.parametrize("key", ["val.every", "run.checkpoint_every"])
def test_where_weights_are_exact_is_part_of_an_experiment_with_a_rate(key: str, tmp_path: Path):
    for rate in ("0.05", None):
        stored, sets = tmp_path / "config.toml", [f"snapshot.rate={rate}"] if rate else []
        stored.write_text(to_toml(load("k5", sets)))
        changed = load("k5", [*sets, f"{key}=7"])
        if rate is None:
            check_resumes(stored, changed)
            continue
        with pytest.raises(ConfigError, match=f"this is another: {key}"):
            check_resumes(stored, changed)


def test_a_run_that_met_a_limit_goes_on_with_a_higher_one_and_not_with_a_lower(tmp_path: Path):
    stored = tmp_path / "config.toml"
    stored.write_text(to_toml(load("k5")))
    check_resumes(stored, load("k5", ["grpo.max_prompt_length=30", "grpo.max_response_length=41"]))
    with pytest.raises(ConfigError, match=r"max_prompt_length 16 -> 15; grpo\.max_prompt_length may only be raised"):
        check_resumes(stored, load("k5", ["grpo.max_prompt_length=15", "grpo.max_response_length=41"]))


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["grpo.lr_schedule.kind=linear"], "run.steps 75 -> 90; grpo.lr_schedule falls over run.steps$"),
        (["grpo.loss_agg_mode=seq-mean-token-sum-norm"], "grpo.max_response_length 40 -> 41$"),
        (["grpo.overlong_buffer.length=8"], "grpo.max_response_length 40 -> 41$"),
    ],
)
def test_what_the_objective_counts_does_not_change(sets: list[str], key: str, tmp_path: Path):
    stored = tmp_path / "config.toml"
    stored.write_text(to_toml(load("k5", sets)))
    name, _, _, value = key.partition(";")[0].removesuffix("$").split()
    with pytest.raises(ConfigError, match=key):
        check_resumes(stored, load("k5", [*sets, f"{name}={value}"]))


def _begun(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, list[Resume | None]]:
    """Exit code of `northstar run k5`, and where it would go on; None: it begins."""
    seen: list[Resume | None] = []

    def execute(config: Any, run: Path, display: Any, resume: Resume | None, address: Any) -> dict[str, Any]:
        seen.append(resume)
        return {"status": "interrupted", "can_go_on": True}

    monkeypatch.setattr(launch, "execute", execute)
    return CliRunner().invoke(app, ["run", "k5", "--out", str(folder), *options]).exit_code, seen


def test_one_command_both_begins_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert _begun(tmp_path / "new", monkeypatch, "--auto-resume") == (75, [None])
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.toml").write_text(to_toml(load("k5")))
    (old / "metrics.jsonl").write_text("")
    assert _begun(old, monkeypatch) == (2, [])
    assert _begun(old, monkeypatch, "--resume") == (2, [])  # it has no checkpoint, and is to keep none
    assert _begun(old, monkeypatch, "--auto-resume") == (75, [Resume(None)])
    (old / "summary.json").write_text('{"status": "completed", "steps": 75}')
    assert _begun(old, monkeypatch, "--auto-resume") == (0, [])
    assert _begun(old, monkeypatch, "--auto-resume", "--set", "grpo.lr=1e-2") == (2, [])


def test_another_number_of_replicas_is_the_same_experiment_and_of_stages_is_not(tmp_path: Path):
    stored = tmp_path / "config.toml"
    stored.write_text(to_toml(load("k5")))
    check_resumes(stored, load("k5", ["swarm.dp=2", "rollout.replicas=3", "anchor.workers=2"]))
    with pytest.raises(ConfigError, match=r"swarm\.pp 1 -> 2"):
        check_resumes(stored, load("k5", ["swarm.pp=2"]))


@pytest.mark.parametrize(("before", "after"), [("swarm.dp=1", "swarm.dp=2"), ("swarm.dp=2", "swarm.dp=1")])
def test_how_gradients_are_summed_is_no_difference_to_one_replica_that_sums_none(
    before: str, after: str, tmp_path: Path
):
    stored = tmp_path / "config.toml"
    stored.write_text(to_toml(load("demo", ["swarm.pp=1", before])))
    check_resumes(stored, load("demo", ["swarm.pp=1", after]))
    with pytest.raises(ConfigError, match=r"another: merger\.kind 'signed_ema' -> 'none'"):
        check_resumes(stored, load("demo", ["swarm.pp=1", after, "merger.kind=none"]))


def test_how_two_replicas_sum_may_not_change(tmp_path: Path):
    stored = tmp_path / "config.toml"
    stored.write_text(to_toml(load("demo")))
    with pytest.raises(ConfigError, match=r"codec\.gradient\.bits 0\.25 -> 0\.5"):
        check_resumes(stored, load("demo", ["codec.gradient.bits=0.5"]))


@pytest.mark.parametrize(("dp", "kept"), [(1, True), (2, False)])
def test_a_run_that_goes_on_has_not_ended_and_another_number_of_replicas_is_the_newer_wish(
    dp: int, kept: bool, tmp_path: Path
):
    (tmp_path / "config.toml").write_text(to_toml(load("k5")))
    (tmp_path / "summary.json").write_text('{"status": "completed"}')
    scale.ask_for(tmp_path, 4)
    launch._goes_on(tmp_path, load("k5", [f"swarm.dp={dp}"]))
    assert not (tmp_path / "summary.json").exists()
    assert load(str(tmp_path / "config.toml"), given=()).swarm.dp == dp
    assert scale.wanted(tmp_path) == (4 if kept else None)


def test_to_scale_a_run_whose_config_does_not_load_is_refused(tmp_path: Path):
    (tmp_path / "config.toml").write_text(to_toml(load("k5")).replace("seed = 0", 'seed = "none"'))
    result = CliRunner().invoke(app, ["scale", str(tmp_path), "--dp", "2"])
    assert result.exit_code == 2 and "run.seed" in result.output and scale.wanted(tmp_path) is None
