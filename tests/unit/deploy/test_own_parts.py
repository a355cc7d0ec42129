"""A codec and a merger of somebody else's are planned, simulated and probed as ours are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from deploy.cli import app
from tests.own_parts import BETWEEN_REPLICAS, NAMED, write_parts

MODULES = ("my_codec", "my_gradient", "my_merger")


@pytest.fixture(autouse=True)
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the files are, on the path of this process until the test is over."""
    write_parts(tmp_path / "parts")
    monkeypatch.syspath_prepend(tmp_path / "parts")
    yield tmp_path / "parts"
    for name in MODULES:
        sys.modules.pop(name, None)


def northstar(command: str, *overrides: str, options: tuple[str, ...] = ()) -> Result:
    sets = [word for override in (*NAMED, *overrides) for word in ("--set", override)]
    return CliRunner().invoke(app, [command, "k5", *sets, *options])


def test_plan_counts_what_they_say_they_cost(tmp_path: Path):
    out = tmp_path / "plan.json"
    result = northstar("plan", "swarm.dp=2", "swarm.pp=2", BETWEEN_REPLICAS, options=("--json", str(out)))
    assert result.exit_code == 0, result.output
    assert "my_codec:half" in result.output and "my_merger:Veto" in result.output
    found = json.loads(out.read_text())
    channels = found["bytes_per_tick"]
    for channel in ("boundary_fwd", "boundary_bwd", "grad_dp", "tied"):
        assert channels[channel]["sent"] == channels[channel]["dense"] / 2  # fp16 of fp32
    assert channels["basis"]["sent"] == 0 < channels["correction"]["sent"]
    state = [part["bytes"] for part in found["memory"] if part["name"] == "merger's state"]
    assert state == [8, 8]  # of either stage


def test_the_merger_moves_the_weights_whose_deltas_are_planned(tmp_path: Path):
    def snapshot(*overrides: str) -> float:
        out = tmp_path / "plan.json"
        assert northstar("plan", "grpo.lr=1e-4", *overrides, options=("--json", str(out))).exit_code == 0
        return json.loads(out.read_text())["bytes_per_tick"]["snapshot"]["sent"]

    assert snapshot() != snapshot("merger.dose=0.0") > 0


def test_simulate_runs_them(tmp_path: Path):
    result = northstar("simulate", options=("--ticks", "20", "--out", str(tmp_path / "s")))
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "s" / "simulation.json").read_text())
    sent = {
        channel: entry["sent"] / entry["dense"] for channel, entry in facts["bytes_per_hour"].items() if entry["dense"]
    }
    assert sent["boundary_fwd"] == sent["boundary_bwd"] == 0.5 and facts["corrections_merged"] == 4


def test_probe_scores_the_codec(tmp_path: Path):
    out = tmp_path / "probe.json"
    small = ("swarm.micro_batch_size=16", "rollout.batch_size=4")
    result = northstar("probe", *small, options=("--tokens", "20", "--json", str(out)))
    assert result.exit_code == 0, result.output
    (own,) = [score for score in json.loads(out.read_text())["scores"] if score["own"]]
    assert own["name"] == "float16" and own["compresses"] and 0 < abs(own["kl"]) < 1e-4
    assert own["total_rate"] == own["payload_rate"] == 0.5 and own["side_bytes"] == 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["codec.kind=my_codec:Half"], "'my_codec:Half' does not say what it costs: give it an attribute `cost`"),
        (["codec.kind=no_codec:half"], "codec.kind = 'no_codec:half' cannot be imported here: ModuleNotFoundError"),
        (["merger.kind=my_merger:torch"], "merger.kind = 'my_merger:torch' is no merger: it lacks"),
        (["merger.kind=no_merger:Veto"], "merger.kind = 'no_merger:Veto' cannot be imported here: ModuleNotFoundError"),
        (["merger.kind=vetto"], "'vetto' must be one of"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_what_cannot_be_planned_is_refused_with_what_to_do(command: str, overrides: list[str], says: str):
    result = northstar(command, *overrides)
    assert result.exit_code == 2 and says in result.output and "Traceback" not in result.output


def test_the_command_finds_them_beside_the_run(parts: Path):
    """In a process of its own, with nothing on its path but the folder it is started in."""
    command = [Path(sys.executable).with_name("northstar"), "plan", "k5", *(w for n in NAMED for w in ("--set", n))]
    done = subprocess.run(command, cwd=parts, capture_output=True, text=True)
    assert done.returncode == 0 and "my_merger:Veto" in done.stdout, done.stderr
