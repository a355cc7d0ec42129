"""What a tick takes beside its ranks, by how many there are: `timing_s/control` of k5 without an anchor. `make bench-control`.

Of a tick, what is no rank's: the driver asks them, hears from them, and counts and writes down what they say. Replicas of one
stage, or of two from four on, with two samples each. On a machine with fewer cores than ranks they take turns there, driver
included, so only as many ranks as there are free cores say what it would be on a cluster.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.records import kept_records
from deploy.cluster.launch import cluster, drive
from deploy.config import load
from swarm.coordinator import CONTROL_S, TICK_S

STEPS, WARM = 20, 5
GRIDS = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2), 16: (8, 2)}  # ranks: replicas, stages


def settings(ranks: int) -> list[str]:
    dp, pp = GRIDS[ranks]
    prompts = [f"grpo.{key}={max(dp, 2)}" for key in ("train_batch_size", "ppo_mini_batch_size")]
    small = [*prompts, "grpo.group_size=2", "swarm.micro_batch_size=2", f"run.steps={STEPS}"]
    alone = ["anchor.enabled=false", "merger.kind=none", "val.size=8", f"val.every={STEPS}"]
    return [f"swarm.dp={dp}", f"swarm.pp={pp}", *small, *alone]


def milliseconds(folder: Path) -> tuple[float, float]:
    """Of a run's ticks, medians: beside the ranks, and in all."""
    records = kept_records(folder)
    ticks = [r for r in records if r["kind"] == "tick" and r["step"] > WARM]
    control, whole = (1e3 * statistics.median(tick[name] for tick in ticks) for name in (CONTROL_S, TICK_S))
    return control, whole


def main() -> None:
    """Of the numbers of ranks in the command line, or all."""
    print(f"{os.cpu_count()} cores")
    for ranks in [int(word) for word in sys.argv[1:]] or list(GRIDS):
        config = load("k5", settings(ranks))
        with tempfile.TemporaryDirectory() as temporary, cluster(config, address=None):
            drive(config, Path(temporary) / "run", lambda record: None)
            control, whole = milliseconds(Path(temporary) / "run")
        print(f"{ranks:3} ranks: {control:6.1f} ms of a tick of {whole:6.1f} ms", flush=True)


if __name__ == "__main__":
    main()
