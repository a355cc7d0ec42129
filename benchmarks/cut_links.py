"""A node's link is cut, and heals: what does the demo do meanwhile, and in which weights does it end? `make cut-links`.

python -m benchmarks.cut_links [SECONDS …] [far|swarm …] [RAY_setting=value …] [section.key=value …]

On the three nodes of `benchmarks/slow_links.py`, links as fast as the machine is. In the middle of a run nothing reaches
the node and nothing leaves it, and nobody is told: its cable is out, as seen from the bridge. Linux, as root.

    far            engines and anchor       swarm          the second replica

Ray calls a node dead that has not answered for some 15 to 30 s, for good, and gives up a call whose connection was silent for 30 s: with
its own settings (RAY_health_check_failure_threshold=5 RAY_grpc_keepalive_timeout_ms=20000) such a cut is the loss of what is behind it.
All nodes are PATIENT here, as `docs/reliability.md` advises for such links.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos import Records
from benchmarks.slow_links import HEAD_NODE, alone, network, raylets, sh
from deploy.config import load

CUT, SECONDS, LIMIT_S = {"far": "nslink-c", "swarm": "nslink-b"}, [30.0], 900.0
AFTER = 6  # ticks
SHORT = ["run.steps=8", "val.size=32", "val.every=1000", "swarm.placement=replicas", "swarm.start_timeout_s=90"]
PATIENT = {
    "RAY_health_check_failure_threshold": "20",  # checks, 3 s apart
    "RAY_grpc_keepalive_timeout_ms": "120000",
}


def cut(name: str, seconds: float) -> None:
    sh(f"ip link set {name}-br down")
    try:
        time.sleep(seconds)
    finally:
        sh(f"ip link set {name}-br up")


class Cutter(threading.Thread):
    """Cuts a node's link once, when the run has completed AFTER ticks."""

    def __init__(self, records: Records, name: str, seconds: float):
        super().__init__(daemon=True)
        self.records, self.name, self.seconds = records, name, seconds
        self.healed = 0.0  # when, seconds since the epoch
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.records.look()
            if self.records.tick >= AFTER and not self.healed:
                cut(self.name, self.seconds)
                self.healed = time.time()


def driven(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary of a run on the nodes that are there; of one that could not even write it, how it ended."""
    command = f"ip netns exec {HEAD_NODE} {sys.executable} -m benchmarks.slow_links {folder} demo"
    done = subprocess.run([*shlex.split(command), *overrides], timeout=LIMIT_S, capture_output=True, text=True)
    summary = folder / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else {"status": "failed", "error": done.stderr[-500:]}


def row(folder: Path, where: str, seconds: float, overrides: list[str], undisturbed: dict[str, Any]) -> str:
    """One run with one cut, in words."""
    config = load("demo", overrides)
    cutter = Cutter(Records(folder, config.grpo.ticks_per_step), CUT[where], seconds)
    cutter.start()
    try:
        summary = driven(folder, overrides)
    finally:
        cutter.over.set()
        cutter.join()
    cutter.records.look()
    head = f"{where:6} cut for {seconds:3.0f} s: {summary['status']}"
    if summary["status"] != "completed":
        return f"{head}: {summary['error']}"
    waited = [at - cutter.healed for at, _ in cutter.records.ticks() if at > cutter.healed]
    same = summary["weights_digests"] == undisturbed["weights_digests"]
    events = [r["event"] for _, r in cutter.records.seen if r["kind"] == "event" and r["event"] != "started"]
    said = f", events: {', '.join(events)}" if events else ""
    return f"{head}, next tick {waited[0] if waited else 0:.1f} s after it healed, {'the same' if same else 'OTHER'} weights{said}"


def main() -> None:
    durations = [float(word) for word in sys.argv[1:] if word[0].isdigit()] or SECONDS
    places = [word for word in sys.argv[1:] if word in CUT] or list(CUT)
    settings = [word for word in sys.argv[1:] if "=" in word]
    overrides = [*SHORT, *(word for word in settings if not word.startswith("RAY_"))]
    os.environ |= PATIENT | dict(word.split("=") for word in settings if word.startswith("RAY_"))
    with alone(), tempfile.TemporaryDirectory(prefix="northstar-cut-") as temporary, network():
        folder = Path(temporary)
        with raylets(folder, cpus=2):
            undisturbed = driven(folder / "undisturbed", overrides)
        print(f"undisturbed: {undisturbed['status']} in {undisturbed['wall_s']:.0f} s", flush=True)
        for seconds in durations:
            for where in places:
                with raylets(folder, cpus=2):  # anew: a node that was called dead does not come back
                    print(row(folder / f"{where}-{seconds:g}", where, seconds, overrides, undisturbed), flush=True)


if __name__ == "__main__":
    main()
