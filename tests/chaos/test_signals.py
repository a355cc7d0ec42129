"""Ctrl-C and SIGTERM on the real command: nothing of ours is left running, and the run folder can be read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from deploy.cluster.sweep_runs import planned_runs
from experiments.sweep import read_sweep
from tests.ray.conftest import SIZES, SMALL
from tests.ray.test_loopback import members, open_to_others

pytestmark = pytest.mark.slow

NORTHSTAR = Path(sys.executable).parent / "northstar"


def _descendants(marker: str) -> list[str]:
    """Command lines of live processes whose environment holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def _heed_ctrl_c() -> None:
    """Also where the tests run in the background of a shell, which makes its children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _started(arguments: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """The command in a process group of its own, which is gone at the end, also if the test failed."""
    process = subprocess.Popen(
        [NORTHSTAR, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _until_two_steps(process: subprocess.Popen, metrics: Path) -> None:
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count('"kind": "step"') >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
        time.sleep(0.2)


def _left_behind(marker: str) -> list[str]:
    deadline = time.monotonic() + 30
    while (left := _descendants(marker)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


@pytest.mark.parametrize(("sent", "to_group"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_the_run_cleanly(sent: signal.Signals, to_group: bool, tmp_path: Path):
    """To the command alone, and to its whole process group, as batch systems do: Ray's processes are not in it."""
    run, marker = tmp_path / "run", f"NORTHSTAR_TEST_MARK={os.getpid()}-{sent.name}-{to_group}"
    sizes = SMALL if to_group else (*SIZES, "anchor.enabled=false", "merger.kind=none")
    arguments = [x for override in (*sizes, "run.steps=5000") for x in ("--set", override)]
    environment = dict(os.environ) | dict([marker.split("=")])
    environment["RAY_ADDRESS"] = "127.0.0.1:1"  # without --address a run has a cluster of its own, whatever this says
    environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"  # how long Ray looks for a control store that is gone
    metrics = run / "metrics.jsonl"
    with _started(["run", "k5", *arguments, "--out", str(run)], environment) as process:
        _until_two_steps(process, metrics)
        assert len(_descendants(marker)) > 4
        assert open_to_others(members(marker.split("=")[1])) == []
        os.killpg(process.pid, sent) if to_group else process.send_signal(sent)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == (75 if sent == signal.SIGTERM else 130), output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] >= 2
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    assert "interrupted" in output
    assert _left_behind(marker) == []


def test_ctrl_c_ends_a_sweep_that_can_go_on(tmp_path: Path):
    """The second of its runs is stopped; the first is not made again, and nothing of ours is left running."""
    sweep, out, marker = tmp_path / "s.toml", tmp_path / "out", f"NORTHSTAR_TEST_MARK={os.getpid()}-sweep"
    cells = 'short = {run.steps = 1, anchor.enabled = false, merger.kind = "none"}\nlong.run.steps = 5000'
    sweep.write_text(f'name = "s"\nbase = "k5"\nseeds = [0]\n[cells]\n{cells}\n')
    arguments = [x for override in SMALL for x in ("--set", override)]
    environment = dict(os.environ) | dict([marker.split("=")])
    with _started(["sweep", str(sweep), "--out", str(out), *arguments], environment) as process:
        _until_two_steps(process, out / "long" / "seed-0" / "metrics.jsonl")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "1 of 2 runs completed, 0 failed" in output, output
    assert json.loads((out / "long" / "seed-0" / "summary.json").read_text())["status"] == "interrupted"
    assert [run.state for run in planned_runs(read_sweep(sweep), out, list(SMALL))] == ["completed", "waiting"]
    assert "interrupted" in (out / "report.html").read_text()
    assert _left_behind(marker) == []


def test_a_control_store_that_dies_as_the_run_completes_changes_neither_its_end_nor_its_code(tmp_path: Path):
    run, marker = tmp_path / "run", f"NORTHSTAR_TEST_MARK={os.getpid()}-gcs"
    overrides = (*SIZES, "run.steps=1", "anchor.enabled=false", "merger.kind=none")
    arguments = [x for override in overrides for x in ("--set", override)]
    environment = dict(os.environ) | dict([marker.split("=")])
    with _started(["run", "k5", *arguments, "--out", str(run)], environment) as process:
        deadline = time.monotonic() + 240
        while not (run / "summary.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
            time.sleep(0.01)
        for number in _processes(marker, "gcs_server"):
            os.kill(number, signal.SIGKILL)
        output, _ = process.communicate(timeout=50)  # Ray itself would wait for 60 s, and then exit with 1
    assert process.returncode == 0, output
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    assert "k5: completed" in output and (run / "report.html").exists()
    assert _left_behind(marker) == []


def _processes(marker: str, program: str) -> list[int]:
    """Of those that `_descendants` names, the numbers of the ones that run `program`."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and marker.encode() in (entry / "environ").read_bytes():
                if program in (entry / "comm").read_text():
                    found.append(int(entry.name))
    return found
