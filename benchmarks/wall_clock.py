"""Does the swarm ever wait for the anchor? Tick rate beside an anchor slowed 100 times, over that without one.

Pairs of runs in turn on one Ray cluster, so that drift of the machine hits both: `make bench-wall`.
The anchor is slowed by sleeping: it shares two cores with the swarm here, as it would not on a cluster.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from pathlib import Path

from scipy.stats import t

from deploy.cluster.launch import cluster, drive
from deploy.config import load

REPETITIONS, STEPS = 12, 20
COMMON = [f"run.steps={STEPS}", "val.size=8", f"val.every={STEPS}", "swarm.pp=2"]
WITHOUT = ["anchor.enabled=false", "merger.kind=none"]
SLOWED = ["anchor.clock=wall", "anchor.slowdown=100.0"]


def tick_rate(name: str, overrides: list[str], folder: Path) -> tuple[float, int]:
    """Ticks a second, the first step left out as warm-up, and corrections merged."""
    drive(load("k5", COMMON + overrides), folder / name, lambda record: None)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [r["timing_s/tick"] for r in records if r["kind"] == "tick" and r["step"] > 1]
    merged = sum(r["kind"] == "fire" for r in records)
    return 1 / statistics.mean(seconds), merged


def ratio_interval(ratios: list[float]) -> tuple[float, float]:
    """95 % Student interval of the geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return math.exp(mean - half), math.exp(mean + half)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, cluster(load("k5", COMMON), address=None):
        ratios = []
        for i in range(REPETITIONS):
            pair = {"without": WITHOUT, "slowed": SLOWED}
            order = pair if i % 2 == 0 else reversed(pair)  # each goes first in turn: what drifts cancels
            seen = {name: tick_rate(f"{name}-{i}", pair[name], Path(temporary)) for name in order}
            (rate, _), (slowed, merged) = seen["without"], seen["slowed"]
            ratios.append(slowed / rate)
            print(
                f"pair {i}: {rate:.2f} ticks/s without, {slowed:.2f} beside a slow anchor ({merged} merged): {ratios[-1]:.3f} x",
                flush=True,
            )
        low, high = ratio_interval(ratios)
        print(
            f"{statistics.geometric_mean(ratios):.3f} x of the tick rate without an anchor, "
            f"95 % interval {low:.3f} to {high:.3f}, median {statistics.median(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
