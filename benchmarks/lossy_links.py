"""The demo over links that lose packets: in which weights does it end, and in what time? `make lossy-links`.

On the three nodes of `benchmarks/slow_links.py`, shaped to RATE with a queue of QUEUE_MS: what does not fit is dropped, as by a
cheap router, and TCP sends it again. The share that was lost is what the queues have counted. Linux, as root.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from benchmarks.slow_links import alone, ends, network, raylets, run_over, summary

RATE, QUEUES_MS = "16mbit", (500, 5, 1)  # the first is as bench-links has it
SHORT = ["run.steps=8", "val.size=32", "val.every=1000", "swarm.placement=replicas"]
COUNTED = re.compile(r"Sent \d+ bytes (\d+) pkt \(dropped (\d+),")


def sent_and_dropped() -> tuple[int, int]:
    """Packets that were sent since the links were shaped, and that were dropped."""
    sent = dropped = 0
    for where, device in ends():
        command = shlex.split(f"{where}tc -s qdisc show dev {device}")
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = COUNTED.findall(said)
        sent += sum(int(each) for each, _ in found)
        dropped += sum(int(each) for _, each in found)
    return sent, dropped


def main() -> None:
    with alone(), tempfile.TemporaryDirectory(prefix="northstar-lossy-") as temporary, network():
        folder = Path(temporary)
        with raylets(folder, cpus=2):
            free = summary(run_over(folder, "demo", SHORT, None))
            print(f"free links: {free['wall_s']:.0f} s", flush=True)
            for queue in QUEUES_MS:
                found = summary(run_over(folder, "demo", SHORT, RATE, queue))
                sent, dropped = sent_and_dropped()
                same = "the same weights" if found["weights_digests"] == free["weights_digests"] else "OTHER WEIGHTS"
                share = 100 * dropped / max(1, sent + dropped)
                print(f"{RATE}, queue {queue} ms: {found['wall_s']:.0f} s, {share:.2f} % lost, {same}", flush=True)


if __name__ == "__main__":
    main()
