"""Kills at random moments of a small lockstep run, one a run: does it end in the weights of the undisturbed one? `make kills`.

python -m benchmarks.kills [--kills N] [--seed S] [--only "kill worker,kill driver"] [section.key=value …]

Two replicas of two stages, an engine, an anchor, on a Ray cluster of the run's own; moments uniform over the run, one in four
in a checkpoint instead. A run that ends before its last step is started again with --resume, and said to have been. Exit 0 only if
every digest is that of the undisturbed run, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.chaos import Fault, Injector, random_faults
from benchmarks.chaos_runs import MARK, command, completed
from benchmarks.judge import Surroundings, all_kept, recoveries
from benchmarks.soak import weights_of
from deploy.config import load
from swarm.run_config import RunConfig

KILLS, LIMIT_S, IN_CHECKPOINT = 20, 900.0, 0.25
WEIGHTS = {
    "kill worker": 4.0,
    "kill engine": 2.0,
    "kill anchor": 2.0,
    "kill driver": 2.0,
    "kill node": 1.0,
    "kill gcs": 1.0,
}
OVERRIDES = [
    "run.steps=8",
    "run.checkpoint_every=2",
    "grpo.train_batch_size=4",
    "grpo.ppo_mini_batch_size=2",
    "grpo.group_size=4",
    "rollout.batch_size=2",
    "rollout.replicas=1",
    "swarm.dp=2",
    "swarm.pp=2",
    "swarm.micro_batch_size=4",
    "anchor.delay_k=3",
    "anchor.cadence=2",
    "val.size=8",
    "val.every=8",
]


class Ended(NamedTuple):
    """Of one run: its digests, what was done to it, how often it was started, and whether nothing is left of it."""

    digests: list[str]
    said: str
    starts: int
    clean: bool


def ended(config: RunConfig, overrides: list[str], fault: Fault | None, run: Path) -> Ended:
    marker = f"{os.getpid()}-{time.time_ns()}"
    around = Surroundings(f"{MARK}={marker}")
    with Injector(run, [fault] if fault else [], config.grpo.ticks_per_step) as injector:
        starts = completed(command("k5", overrides, run, None), injector, marker, LIMIT_S)
    left = all_kept(around.left())
    if starts[-1].code:
        return Ended(
            [], f"NOT COMPLETED, exit {starts[-1].code}: {(run / 'summary.json').read_text()[-300:]}", len(starts), left
        )
    digests = json.loads((run / "summary.json").read_text())["weights_digests"]
    hit = recoveries(injector.records, injector.struck)
    said = ", ".join(f"next tick after {each.next_tick:.1f} s, {each.undone} taken again" for each in hit)
    return Ended(digests, said if hit or not fault else "found nobody, or came after the last tick", len(starts), left)


def main() -> None:
    parser = argparse.ArgumentParser(prog="kills", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=weights_of, default=WEIGHTS, help='kinds and weights, "kill worker=2,kill driver"'
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    asked = parser.parse_args()
    overrides = [*OVERRIDES, *asked.overrides]
    config, bad = load("k5", overrides), 0
    faults = random_faults(asked.seed, asked.kills, config, asked.only, in_checkpoint=IN_CHECKPOINT)
    with tempfile.TemporaryDirectory(prefix="northstar-kills-") as temporary:
        undisturbed = ended(config, overrides, None, Path(temporary) / "undisturbed")
        print(f"undisturbed: {' '.join(undisturbed.digests)}", flush=True)
        for i, fault in enumerate(faults):
            found = ended(config, overrides, fault, Path(temporary) / f"{i}")
            same = bool(found.digests) and found.digests == undisturbed.digests
            bad += not (same and found.clean)
            verdict = ("the same weights" if same else "OTHER WEIGHTS") + ("" if found.clean else ", PROCESSES LEFT")
            print(f"{fault!s:30} {verdict}; {found.said}; started {found.starts} times", flush=True)
    print(f"{asked.kills - bad} of {asked.kills} ended in the weights of the undisturbed run")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
