"""Runs that go on: made longer, from damaged checkpoints, after they are complete, and where going on fails."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.cluster.launch import drive
from deploy.config import to_toml
from deploy.resume import Resume, plan_resume
from swarm import manifest
from swarm.manifest import CheckpointError
from tests.ray.conftest import SMALL, ignore, lines, of_kind, run_kept, small

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

NORTHSTAR = Path(sys.executable).parent / "northstar"
EVERY = "run.checkpoint_every=2"


@pytest.fixture(scope="module")
def short(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of six steps, with checkpoints of steps 2 and 4, as a run of four steps leaves them."""
    run = tmp_path_factory.mktemp("runs") / "short"
    run_kept(small(EVERY, "run.steps=4"), run)
    return run


@pytest.fixture(scope="module")
def long(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps from the start."""
    run = tmp_path_factory.mktemp("runs") / "long"
    return run_kept(small(), run) | {name: lines(run, f"{name}.jsonl") for name in ("corrections", "samples")}


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files}


def command(run: Path, *overrides: str, resume: bool = True) -> Result:
    """`northstar run k5` in this process: for what is refused before Ray is needed."""
    sets = [x for override in (*SMALL, *overrides) for x in ("--set", override)]
    return CliRunner().invoke(app, ["run", "k5", *sets, "--out", str(run), *(["--resume"] if resume else [])])


# --- made longer -------------------------------------------------------------------------------


def test_a_run_made_longer_ends_where_one_that_was_long_from_the_start_did(
    short: Path, long: dict[str, Any], tmp_path: Path
):
    """By the command as a user gives it; a third call says that it is completed, and changes nothing."""
    run = tmp_path / "run"
    shutil.copytree(short, run)
    sets = [x for override in (*SMALL, EVERY, "run.steps=6") for x in ("--set", override)]
    call = [NORTHSTAR, "run", "k5", *sets, "--out", run, "--resume"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=240, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0 and "k5: completed" in done.stdout, done.stdout + done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights_digests"] == long["weights_digests"]
    assert lines(run, "corrections.jsonl") == long["corrections"]
    assert [record["tick"] for record in of_kind(run, "tick")] == list(range(1, 13))
    at_its_old_end = ("val", 4)
    assert [s for s in lines(run, "samples.jsonl") if (s["kind"], s["step"]) != at_its_old_end] == long["samples"]
    before = content(run)
    third = command(run, EVERY)
    assert third.exit_code == 0 and "is completed, 6 steps: nothing is left to do" in third.output
    assert content(run) == before


def test_so_does_one_whose_lag_varies(tmp_path: Path):
    varied = 'anchor.lag={kind="uniform", low=1.0, high=9.0}'
    whole = run_kept(small(varied), tmp_path / "whole")
    run_kept(small(varied, "run.checkpoint_every=3", "run.steps=3"), tmp_path / "parts")
    parts = run_kept(small(varied, "run.checkpoint_every=3"), tmp_path / "parts", resume=True)
    assert parts["weights_digests"] == whole["weights_digests"]
    assert lines(tmp_path / "parts", "corrections.jsonl") == lines(tmp_path / "whole", "corrections.jsonl")


def test_so_does_one_whose_engines_follow_coded_steps(tmp_path: Path):
    """Weights are exact at a checkpoint; every sample is of what the stream holds, so the weights are other ones."""
    coded = "snapshot.rate=0.02", "run.checkpoint_every=3"
    whole = run_kept(small(*coded), tmp_path / "whole")
    run_kept(small(*coded, "run.steps=3"), tmp_path / "parts")
    parts = run_kept(small(*coded, "rollout.replicas=2"), tmp_path / "parts", resume=True)
    assert parts["weights_digests"] == whole["weights_digests"]
    assert lines(tmp_path / "parts", "corrections.jsonl") == lines(tmp_path / "whole", "corrections.jsonl")
    held = [[r["rollout/weights_digest"] for r in of_kind(tmp_path / run, "step")] for run in ("whole", "parts")]
    assert held[0] == held[1]
    exact = run_kept(small("run.checkpoint_every=3"), tmp_path / "exact")
    sent = [run["bytes"]["rollout_sync"]["sent"] for run in (whole, exact)]
    assert whole["weights_digests"] != exact["weights_digests"] and sent[0] < 0.6 * sent[1]


def test_checkpoints_may_be_given_up_on_the_way_and_engines_and_anchors_be_more(
    short: Path, long: dict[str, Any], tmp_path: Path
):
    """Then no fire is started for a run that is longer still."""
    run = tmp_path / "run"
    shutil.copytree(short, run)
    more = "rollout.replicas=2", "anchor.workers=2"
    summary = run_kept(small("run.checkpoint_every=0", *more), run, resume=True)
    assert summary["weights_digests"] == long["weights_digests"]
    assert lines(run, "corrections.jsonl") == long["corrections"]


def test_a_run_goes_to_more_replicas_and_back_and_takes_the_same_ticks_up_to_rounding(tmp_path: Path):
    two_stages = small("swarm.pp=2"), small("swarm.pp=2", EVERY, "run.steps=2")
    more = small("swarm.pp=2", EVERY, "run.steps=4", "swarm.dp=2", "rollout.replicas=2", "anchor.workers=2")
    fixed, changed = tmp_path / "fixed", tmp_path / "changed"
    run_kept(two_stages[0], fixed)
    run_kept(two_stages[1], changed)
    run_kept(more, changed, resume=True)
    run_kept(small("swarm.pp=2", EVERY), changed, resume=True)
    for name in ("actor/pg_loss", "actor/grad_norm", "merger/dose"):
        one, other = ([t[name] for t in of_kind(run, "tick") if name in t] for run in (fixed, changed))
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-7)
    assert len(lines(fixed, "corrections.jsonl")) == len(lines(changed, "corrections.jsonl")) > 2
    said = [(e["dp_before"], e["dp"], e["reason"]) for e in of_kind(changed, "event") if e["event"] == "grid changed"]
    assert [grids for *grids, _ in said] == [[1, 2], [2, 1]]
    assert said[0][2] == "swarm.dp 1 -> 2: results are equal up to rounding, not to the bit"


def test_one_stopped_before_its_first_checkpoint_begins_anew(short: Path, long: dict[str, Any], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(short, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "summary.json").unlink()
    summary = run_kept(small(EVERY), run, resume=True)
    assert summary["weights_digests"] == long["weights_digests"]
    assert [record["tick"] for record in of_kind(run, "tick")] == list(range(1, 13))
    assert lines(run, "corrections.jsonl") == long["corrections"]


# --- refused, and nothing is changed -----------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["grpo.lr=1e-3"], "this is another: grpo.lr"),
        (["run.steps=3"], "is at step 4 and run.steps is 3: nothing is left to do"),
        (["model.path=nowhere"], "no such model"),
    ],
)
def test_a_resume_that_is_refused_changes_nothing(overrides: list[str], says: str, short: Path):
    before = content(short)
    found = command(short, EVERY, *overrides)
    assert found.exit_code == 2 and says in found.output
    assert content(short) == before


def test_a_folder_without_a_run_is_not_made_one(tmp_path: Path):
    found = command(tmp_path / "new", EVERY)
    assert found.exit_code == 2 and "holds no run to go on with" in found.output
    assert not (tmp_path / "new").exists()


def test_a_run_without_checkpoints_says_how_to_have_them(short: Path, tmp_path: Path):
    (tmp_path / "config.toml").write_text(to_toml(small()))
    found = command(tmp_path)
    assert found.exit_code == 2 and "set run.checkpoint_every before the run starts" in found.output


@pytest.mark.parametrize("failure", [RuntimeError("no room"), KeyboardInterrupt()])
def test_going_on_that_fails_before_it_does_leaves_the_record(short: Path, tmp_path: Path, failure: BaseException):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    before = {name: (run / name).read_bytes() for name in ("summary.json", "config.toml", "metrics.jsonl")}

    def no_actors(config: Any) -> Any:
        raise failure

    with pytest.raises(type(failure)):
        drive(small(EVERY), run, ignore, Resume(run / "checkpoints" / "step-000004"), no_actors)
    assert {name: (run / name).read_bytes() for name in before} == before


# --- damaged -----------------------------------------------------------------------------------


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _forge(file: Path, name: str) -> None:
    """A number that is not finite, under a digest that is right."""
    tensors = load_file(file)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, file)
    _sign(file)


def _forge_m_bar(file: Path) -> None:
    values = np.fromfile(file, np.float32)
    values[3] = np.inf
    file.write_bytes(values.tobytes())
    _sign(file)


def _sign(file: Path) -> None:
    stored = file.parent / manifest.NAME
    entries = json.loads(stored.read_text())
    entries[file.name] = manifest.entry(file)
    stored.write_text(json.dumps(entries))


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped byte of a rank": ("rank-d0p0.safetensors", _flip, "is damaged"),
    "a flipped byte of M̄": ("m_bar.frame", _flip, "is damaged"),
    "half a rank": ("rank-d0p0.safetensors", _halve, "were written"),
    "half a correction": ("fire-4-0.frame", _halve, "were written"),
    "an empty state": ("state.json", _empty, "has 0 bytes"),
    "half a manifest": (manifest.NAME, _halve, "is damaged"),
    "no manifest": (manifest.NAME, Path.unlink, "cannot be read"),
    "no rank": ("rank-d0p0.safetensors", Path.unlink, "is missing"),
    "NaN in weights": ("rank-d0p0.safetensors", lambda f: _forge(f, "weights"), "weights holds numbers"),
    "NaN in Adam": ("rank-d0p0.safetensors", lambda f: _forge(f, "adam.exp_avg_sq"), "adam.exp_avg_sq holds numbers"),
    "infinity in M̄": ("m_bar.frame", _forge_m_bar, "M̄ holds numbers"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(kind: str, short: Path, tmp_path: Path):
    name, damage, says = DAMAGE[kind]
    run = tmp_path / "run"
    shutil.copytree(short, run)
    damage(run / "checkpoints" / "step-000004" / name)
    found = plan_resume(run, small(EVERY))
    assert found is not None and found.checkpoint == run / "checkpoints" / "step-000002"
    (reason,) = found.damaged
    assert name in reason and says in reason
    damage(run / "checkpoints" / "step-000002" / name.replace("fire-4", "fire-2"))
    with pytest.raises(CheckpointError, match=r"has no checkpoint that is whole: .*step-000004.*step-000002"):
        plan_resume(run, small(EVERY))


def test_a_run_that_falls_back_ends_in_the_same_weights_and_says_what_it_passed_over(
    short: Path, long: dict[str, Any], tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    _flip(run / "checkpoints" / "step-000004" / "rank-d0p0.safetensors")
    summary = run_kept(small(EVERY), run, resume=True)
    assert summary["weights_digests"] == long["weights_digests"]
    (event,) = [e for e in of_kind(run, "event") if e["event"] == "checkpoint damaged"]
    assert "rank-d0p0.safetensors" in event["reason"] and event["used"] == "step-000002"


def test_an_export_passes_over_a_damaged_checkpoint_and_refuses_one_that_is_asked_for(short: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    _flip(run / "checkpoints" / "step-000004" / "rank-d0p0.safetensors")
    found = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert found.exit_code == 0 and "passed over: " in found.output and "step 2:" in found.output
    asked = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "other"), "--step", "4"])
    assert asked.exit_code == 2 and "is damaged" in asked.output and not (tmp_path / "other").exists()
