"""The demo's configuration on the wall clock over three raylets of this machine, under random faults. `make soak`.

python -m benchmarks.soak [--faults N] [--steps N] [--seed S] [--only "kill engine=2,pause worker=1"] [section.key=value …]

The faults of WEIGHTS at moments spread over the run, by seed; a driver that was killed is started again with --resume, and so
is a run that ends before its last step, which is a bar that it fails. Prints what is kept and what is not
(`benchmarks/judge.py`); exit 0 only if every bar is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.chaos import Fault, Injector, Struck, random_faults
from benchmarks.chaos_runs import MARK, Start, command, completed, raylets_of
from benchmarks.judge import Memory, Row, Surroundings, all_kept, judged, table
from deploy.config import load
from swarm.run_config import RunConfig

FAULTS, STEPS = 40, 250  # about 20 minutes of two cores
LIMIT_S = 3 * 3600.0
BACK_S = 5.0  # a killed raylet is back after so long
WEIGHTS = {
    "kill engine": 4.0,
    "kill anchor": 4.0,
    "kill worker": 4.0,
    "hang engine": 1.0,
    "hang anchor": 1.0,
    "hang worker": 1.0,
    "pause engine": 2.0,
    "pause anchor": 2.0,
    "pause worker": 2.0,
    "pause driver": 1.0,
    "kill node": 1.0,
    "kill driver": 1.0,
}
NODES = [  # a replica on each of the first two, engines and anchor on the third
    {"num_cpus": 4, "resources": {"swarm": 1}},
    {"num_cpus": 4, "resources": {"swarm": 1}},
    {"num_cpus": 4, "resources": {"far": 1}},
]
OVERRIDES = [
    "anchor.clock=wall",
    "swarm.placement=replicas",
    "faults.spares=2",
    "swarm.resource=swarm",
    "rollout.resource=far",
    "anchor.resource=far",
    "run.checkpoint_every=10",
    "val.every=50",
    "val.size=128",
]


def soak(config: RunConfig, overrides: list[str], faults: list[Fault], folder: Path, limit_s: float) -> list[Row]:
    """One run under these faults; what is kept of the bars, and what was measured."""
    marker, run = f"{os.getpid()}-{time.time_ns()}", folder / "run"
    os.environ[MARK] = marker
    around = Surroundings(f"{MARK}={marker}")
    memory = Memory(around)
    with raylets_of(NODES, BACK_S) as raylets:
        injector = Injector(run, faults, config.grpo.ticks_per_step, raylets.kill)
        words = command("demo", overrides, run, raylets.address)
        with injector:
            starts = completed(words, injector, marker, limit_s, memory.look)
    rows = judged(run, config, injector.records, injector.struck)
    return [*rows, *started(starts, injector.struck), *memory.rows(), *around.left()]


def started(starts: list[Start], struck: list[Struck]) -> list[Row]:
    """A start more for each driver that was killed is right; any other is a run that did not survive."""
    killed = sum(s.fault.role == "driver" and s.fault.kind == "kill" and s.pid is not None for s in struck)
    hours = (time.time() - starts[0].at) / 3600
    hit = sum(each.pid is not None for each in struck)
    return [
        Row("started again", f"{len(starts) - 1} times, {killed} drivers were killed", len(starts) - 1 <= killed),
        Row("faults an hour", f"{hit / hours:.0f}, {hit} in {60 * hours:.1f} minutes"),
    ]


def weights_of(text: str) -> dict[str, float]:
    return {name.strip(): float(weight or 1) for name, _, weight in (each.partition("=") for each in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=FAULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=weights_of, default=WEIGHTS, help='kinds and weights, "kill engine=2,pause worker"'
    )
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--out", type=Path, help="folder that is kept; default: one that is not")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    asked = parser.parse_args()
    overrides = [*OVERRIDES, f"run.steps={asked.steps}", *asked.overrides]
    config = load("demo", overrides)
    faults = random_faults(asked.seed, asked.faults, config, asked.only, len(NODES))
    with tempfile.TemporaryDirectory(prefix="northstar-soak-") as temporary:
        rows = soak(config, overrides, faults, asked.out or Path(temporary), asked.limit_s)
    print(table(rows))
    sys.exit(not all_kept(rows))


if __name__ == "__main__":
    main()
