"""The Slurm script, rehearsed: Slurm's tools, Ray and the command are stood in for by scripts that say what they got."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "slurm" / "northstar.sbatch"
TOOLS = {
    "scontrol": """[[ $1 == requeue ]] && echo "$*" >>"$LOG" && exit
for ((i = 1; i <= NODES; i++)); do echo node$i; done""",
    "squeue": 'echo "${STATE:-RUNNING}"',
    "getent": "echo 10.0.0.2 STREAM node2",
    "ip": """[[ $* == *route* ]] && echo "10.0.0.2 dev ib0 src 10.0.0.1 uid 0" || echo "3: ib0 inet 10.0.0.1/24 scope" """,
    "srun": """for option; do [[ $option == --nodelist=* ]] && export NODE=${option#*=}; done
while [[ $1 == --* ]]; do shift; done
exec "$@" """,
    "ray": """[[ $1 == health-check ]] && exit 0
trap 'echo "down $NODE" >>"$LOG"; exit' TERM
echo "ray $NODE $* $RAY_AUTH_MODE $(cksum <"$RAY_AUTH_TOKEN_PATH") $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME" >>"$LOG"
while :; do sleep 0.05; done""",
    "northstar": """[[ $1 == run ]] && trap 'echo stopping >>"$LOG"; sleep 0.3; echo stopped >>"$LOG"; exit 130' TERM
echo "$*" >>"$LOG"
if [[ $1 == doctor ]]; then # it waits for all nodes
  until (($(grep -c "^ray " "$LOG") == NODES)); do sleep 0.05; done
  exit "${DOCTOR:-0}"
fi
for ((i = 0; i < WAIT_DS; i++)); do sleep 0.1; done
exit "$STATUS" """,
}


@dataclass
class Rehearsal:
    """A made-up allocation; `begin` submits the script to it."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> list[str]:
        file = self.folder / "log"
        return file.read_text().splitlines() if file.exists() else []

    def begin(self, nodes: int = 3, status: int = 0, wait_ds: int = 5, **env: str) -> subprocess.Popen[str]:
        for name, body in TOOLS.items():
            tool = self.folder / "env" / "bin" / name
            tool.parent.mkdir(parents=True, exist_ok=True)
            tool.write_text(f"#!/bin/bash\n{body}\n")
            tool.chmod(0o755)
        ours = {
            "PATH": f"{self.folder}/env/bin:{os.environ['PATH']}",
            "NORTHSTAR_ENV": f"{self.folder}/env",
            "LOG": f"{self.folder}/log",
            "NODES": str(nodes),
            "STATUS": str(status),
            "WAIT_DS": str(wait_ds),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_CPUS_ON_NODE": "8",
        }
        command = ["bash", str(SCRIPT), "k5", str(self.run), "--set", "run.steps=3"]
        return subprocess.Popen(command, env=ours | env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def said(self, start: str) -> list[str]:
        return [line for line in self.log if line.startswith(start)]


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


@pytest.mark.parametrize("nodes", [2, 5])
def test_every_node_gets_one_raylet_and_only_the_last_is_the_anchors(rehearsal: Rehearsal, nodes: int):
    assert rehearsal.begin(nodes).wait(60) == 0
    raylets = rehearsal.said("ray ")
    assert sorted(line.split()[1] for line in raylets) == [f"node{i}" for i in range(1, nodes + 1)]
    assert [line.split()[1] for line in raylets if "--head" in line] == ["node1"]
    assert [line.split()[1] for line in raylets if '--resources={"anchor":1}' in line] == [f"node{nodes}"]
    (doctor,), (run,) = rehearsal.said("doctor"), rehearsal.said("run")
    assert f"--nodes {nodes}" in doctor
    for part in ("k5", "--address 10.0.0.1:6379", "--set anchor.resource=anchor", "--set run.steps=3"):
        assert part in doctor and part in run


def test_another_node_may_be_the_anchors_but_not_the_heads(rehearsal: Rehearsal):
    assert rehearsal.begin(NORTHSTAR_ANCHOR="node2").wait(60) == 0
    assert [line.split()[1] for line in rehearsal.said("ray ") if "anchor" in line] == ["node2"]
    for wrong in ("node1", "node9"):
        assert rehearsal.begin(NORTHSTAR_ANCHOR=wrong).wait(60) == 2


def test_all_nodes_share_one_token_and_one_interface(rehearsal: Rehearsal):
    assert rehearsal.begin().wait(60) == 0
    (shared,) = {tuple(line.split()[-5:]) for line in rehearsal.said("ray ")}
    mode, _, size, *interfaces = shared
    assert (mode, size, interfaces) == ("token", "64", ["ib0", "ib0"])


@pytest.mark.parametrize("status", [0, 1, 130])
def test_the_job_ends_as_the_run_does_and_leaves_nothing_behind(rehearsal: Rehearsal, status: int):
    assert rehearsal.begin(status=status).wait(60) == status
    assert len(rehearsal.said("down")) == 3
    assert not list(rehearsal.run.iterdir())  # the token is gone


def test_the_signal_before_the_time_limit_lets_the_run_end_in_order(rehearsal: Rehearsal):
    job = rehearsal.begin(wait_ds=500)
    while not rehearsal.said("run"):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 130
    ends = [line.split()[0] for line in rehearsal.log if line.startswith(("stop", "down"))]
    assert ends == ["stopping", "stopped", "down", "down", "down"]


def test_a_cluster_that_the_doctor_finds_unfit_runs_nothing(rehearsal: Rehearsal):
    assert rehearsal.begin(DOCTOR="1").wait(60) == 1
    assert not rehearsal.said("run") and len(rehearsal.said("down")) == 3


@pytest.mark.parametrize(
    ("status", "env", "again"),
    [
        (75, {}, True),
        (75, {"STATE": "COMPLETING"}, False),  # cancelled
        (75, {"SLURM_RESTART_COUNT": "3", "NORTHSTAR_RESTARTS": "3"}, False),
        (1, {}, False),
        (130, {}, False),
        (0, {}, False),
    ],
    ids=str,
)
def test_a_run_that_can_go_on_is_queued_again(rehearsal: Rehearsal, status: int, env: dict[str, str], again: bool):
    assert rehearsal.begin(status=status, **env).wait(60) == status
    assert "--auto-resume" in rehearsal.said("run")[0]
    assert rehearsal.said("requeue") == (["requeue 7"] if again else [])
    assert not again or rehearsal.log[-1] == "requeue 7"  # when all of Ray is down


def test_one_node_is_too_few(rehearsal: Rehearsal):
    job = rehearsal.begin(nodes=1)
    assert job.wait(60) == 2
    assert "--nodes=2 or more" in job.stderr.read()
    assert not rehearsal.log
