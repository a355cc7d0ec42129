"""Ctrl-C and SIGTERM on the real command: nothing of ours is left running, and the run folder can be read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray.conftest import SMALL

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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly(sent: signal.Signals, tmp_path: Path):
    run, marker = tmp_path / "run", f"NORTHSTAR_TEST_MARK={os.getpid()}-{sent.name}"
    arguments = [x for override in (*SMALL, "run.steps=5000") for x in ("--set", override)]
    environment = dict(os.environ) | dict([marker.split("=")])
    process = subprocess.Popen(
        [NORTHSTAR, "run", "k5", *arguments, "--out", str(run)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text().count('"kind": "step"') >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
        time.sleep(0.2)
    assert len(_descendants(marker)) > 5
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] >= 2
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    assert "interrupted" in output
    deadline = time.monotonic() + 30
    while (left := _descendants(marker)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
