"""Does the swarm ever wait for the anchor? Tick rate beside one on the wall clock, over that without one.

    slow        one worker, slowed 100 times: its weights are pulled, it is never there
    {20, 2}     ten workers of 20 ticks each: a correction of a lag of 20 ticks every 2 ticks

Pairs of runs in turn on one Ray cluster, so that drift of the machine hits both: `make bench-wall`.
Anchors are slowed by sleeping, so what they compute takes cores from the swarm here, as it would not on a cluster. {20, 2}
is measured with both stages in one process, which leaves one core of two to the anchors; and with two workers on two cores,
with all samples of a tick in each fire or a sixteenth of them, which leaves what the swarm itself does for a fire.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t

from benchmarks.records import kept_records
from deploy.cluster.launch import cluster, drive
from deploy.config import load

REPETITIONS, STEPS = 12, 30
COMMON = [f"run.steps={STEPS}", "val.size=8", f"val.every={STEPS}"]
WITHOUT = ["anchor.enabled=false", "merger.kind=none"]
OFTEN = ["anchor.clock=wall", "anchor.workers=10", 'anchor.lag={kind="uniform", low=20.0, high=20.0}']
TWO_WORKERS = ["swarm.pp=2"]
BESIDE = {
    "slow": [*TWO_WORKERS, "anchor.clock=wall", "anchor.slowdown=100.0"],
    "{20, 2}": OFTEN,
    "{20, 2}, two workers": [*TWO_WORKERS, *OFTEN],
    "{20, 2}, two workers, a sixteenth": [
        *TWO_WORKERS,
        *OFTEN,
        "anchor.replay_fraction=0.0625",
        "anchor.replay=window",
    ],
}


class Seen(NamedTuple):
    """Ticks a second, the first step left out as warm-up; corrections merged, and of those of the run's second half the
    mean lag and hold in ticks: the first fires start before it is known how long a tick takes."""

    rate: float
    merged: int
    lag: float
    hold: float


def drive_one(overrides: list[str], folder: Path) -> Seen:
    drive(load("k5", COMMON + overrides), folder, lambda record: None)
    records = kept_records(folder)
    seconds = [r["timing_s/tick"] for r in records if r["kind"] == "tick" and r["step"] > 1]
    fires = [r for r in records if r["kind"] == "fire" and r["first_tick"] is not None]
    late = [r for r in fires if r["first_tick"] > len(seconds) // 2]
    lags = [r["first_tick"] - r["source_tick"] for r in late]
    held = [b["first_tick"] - a["first_tick"] for a, b in pairwise(late)]
    return Seen(1 / statistics.mean(seconds), len(fires), *(statistics.mean(x or [math.nan]) for x in (lags, held)))


def ratio_interval(ratios: list[float]) -> tuple[float, float]:
    """95 % Student interval of the geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return math.exp(mean - half), math.exp(mean + half)


def compare_rates(name: str, beside: list[str], folder: Path, pairs: int) -> None:
    ratios: list[float] = []
    for i in range(pairs):
        pair = {"without": WITHOUT + [key for key in beside if key in TWO_WORKERS], "beside": beside}
        order = pair if i % 2 == 0 else reversed(pair)  # each goes first in turn: what drifts cancels
        seen = {which: drive_one(pair[which], folder / f"{which}-{i}") for which in order}
        (rate, *_), found = seen["without"], seen["beside"]
        ratios.append(found.rate / rate)
        print(
            f"{name}, pair {i}: {rate:.2f} ticks/s without, {found.rate:.2f} beside ({found.merged} merged, "
            f"lag {found.lag:.1f}, hold {found.hold:.1f}): {ratios[-1]:.3f} x",
            flush=True,
        )
    low, high = ratio_interval(ratios)
    print(
        f"{name}: {statistics.geometric_mean(ratios):.3f} x of the tick rate without an anchor, "
        f"95 % interval {low:.3f} to {high:.3f}, median {statistics.median(ratios):.3f}",
        flush=True,
    )


def main() -> None:
    """Of the names in the command line, or all; a number there: so many pairs."""
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    names = [word for word in sys.argv[1:] if not word.isdigit()] or list(BESIDE)
    with tempfile.TemporaryDirectory() as temporary, cluster(load("k5", COMMON + TWO_WORKERS + OFTEN), address=None):
        for name in names:
            compare_rates(name, BESIDE[name], Path(temporary) / name.replace(" ", "-"), *numbers or [REPETITIONS])


if __name__ == "__main__":
    main()
