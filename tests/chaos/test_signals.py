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


@pytest.mark.parametrize(
    ("sent", "to_group"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)]
)
def test_a_signal_ends_the_run_cleanly(sent: signal.Signals, to_group: bool, tmp_path: Path):
    """To the command alone, and to its whole process group, Ray's own processes included, as batch systems do."""
    run, marker = tmp_path / "run", f"NORTHSTAR_TEST_MARK={os.getpid()}-{sent.name}-{to_group}"
    arguments = [x for override in (*SMALL, "run.steps=5000") for x in ("--set", override)]
    environment = dict(os.environ) | dict([marker.split("=")])
    environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"  # how long Ray looks for a control store that is gone
    process = subprocess.Popen(
        [NORTHSTAR, "run", "k5", *arguments, "--out", str(run)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text().count('"kind": "step"') >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
        time.sleep(0.2)
    assert len(_descendants(marker)) > 5
    os.killpg(process.pid, sent) if to_group else process.send_signal(sent)
    output, _ = process.communicate(timeout=120)
    # with its control store gone, Ray may abort the command after the summary is written
    assert process.returncode == 130 or (to_group and process.returncode != 0), output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] >= 2
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    assert to_group or "interrupted" in output
    deadline = time.monotonic() + 30
    while (left := _descendants(marker)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
