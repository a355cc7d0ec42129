"""What became of a run that was given faults: its folder, what was seen of it while it ran, and what it left behind.

A bar is a law that a run keeps or not; the other rows are measurements. Time is effective where it is the usual time of
what counts at the end: ticks, validations, checkpoints. Whatever was undone, waited for or started again is not.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos import Records, Struck
from benchmarks.records import kept_records
from rl.batch import digest_of_prompts
from rl.model_files import resolve
from rl.prompts import PromptEncoder
from rl.task_sets import TaskSets
from swarm.coordinator import PROMPTS
from swarm.run_config import RunConfig

SHARED_MEMORY = Path("/dev/shm")
GONE_S = 80.0  # Ray's agents of a driver that was killed look for their control store for a minute
SAMPLE_S = 5.0
GROWTH, NOISE_MB = 1.15, 20.0  # of a process that is flat: last quarter of its life over the second
UNDONE = {"engine": 0, "anchor": 0, "worker": 3}  # at most so many ticks are taken again after one of them failed
OFTEN, EFFECTIVE = 0.1, 0.9  # with a fault in at most that share of steps, this share of the time is effective
ORDINARY = {"started", "checkpoint"}  # events of a run without faults


@dataclass(frozen=True)
class Row:
    """`kept`: None of a measurement."""

    name: str
    value: str
    kept: bool | None = None


@dataclass(frozen=True)
class Recovery:
    """After one fault, until the next: seconds to the next completed tick, seconds beyond the usual, ticks taken again."""

    struck: Struck
    next_tick: float
    cost: float
    undone: int


def scheduled_prompts(config: RunConfig) -> list[str]:
    """The digest of each tick's prompts, from the task alone."""
    grpo = config.grpo
    encoder = PromptEncoder(resolve(config.model.path), config.task, grpo.max_prompt_length)
    judge = encoder.judge if config.task.overlong == "drop" else None
    task = TaskSets(config.task, config.val, config.run.seed, judge)
    found: list[str] = []
    for first in range(0, config.run.steps * grpo.train_batch_size, grpo.ppo_mini_batch_size):
        texts = [task.example("train", i).prompt for i in range(first, first + grpo.ppo_mini_batch_size)]
        found.append(digest_of_prompts([p for p in encoder.encode(texts) for _ in range(grpo.group_size)]))
    return found


def judged(run: Path, config: RunConfig, records: Records, struck: Sequence[Struck]) -> list[Row]:
    """What the records say of a run that is over."""
    ticks = [record for record in kept_records(run) if record["kind"] == "tick"]
    summary = json.loads((run / "summary.json").read_text())
    scheduled = scheduled_prompts(config)
    trained = Counter(str(record.get(PROMPTS)) for record in ticks)
    lacking, beyond = Counter(scheduled) - trained, trained - Counter(scheduled)
    digests = summary["weights_digests"]
    stages = {tuple(digests[p :: config.swarm.pp]) for p in range(config.swarm.pp)}
    events = Counter(r["event"] for _, r in records.seen if r["kind"] == "event" and r["event"] not in ORDINARY)
    hit, share = sum(each.pid is not None for each in struck), effective(records)
    often = 0 < hit <= OFTEN * config.run.steps
    last = f"{summary['steps']} of {config.run.steps}, {summary['status']}"
    value = f"{len(ticks)} mini-batches, {lacking.total()} never, {beyond.total()} beyond the schedule"
    return [
        Row("last step", last, summary["status"] == "completed" and summary["steps"] == config.run.steps),
        Row("every prompt trained once", value, [record.get(PROMPTS) for record in ticks] == scheduled),
        Row("replicas end alike", " ".join(digests), bool(digests) and all(len(set(held)) == 1 for held in stages)),
        Row("faults", _counted(f"{each.fault.kind} {each.fault.role}" for each in struck if each.pid is not None)),
        Row("faults that found nobody", str(sum(each.pid is None for each in struck))),
        Row("events", ", ".join(f"{n} x {event}" for event, n in events.most_common()) or "none"),
        Row("effective training time", f"{share:.3f}", share >= EFFECTIVE if often else None),
        *recovered(records, struck),
    ]


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in Counter(names).most_common()) or "none"


def effective(records: Records) -> float:
    """Usual time of what counts at the end over all the time from the first record to the last."""
    usual = records.usual()
    typical = statistics.mean(usual.values()) if usual else 0.0
    counted = {tick for _, tick in records.ticks()}
    useful = sum(usual.get(tick % records.ticks_per_step, typical) for tick in counted)
    useful += sum(_other_work(record) for record in kept_records(records.run))
    return useful / max(records.seen[-1][0] - records.seen[0][0], 1e-9)


def _other_work(record: dict[str, Any]) -> float:
    """Seconds of what a run does beside ticks."""
    if record["kind"] == "val":
        return record["timing_s/testing"]
    return record["seconds"] if record.get("event") == "checkpoint" else 0.0


def recoveries(records: Records, struck: Sequence[Struck]) -> list[Recovery]:
    """Of the faults that found somebody, if neither the one before nor the one after came amid a recovery."""
    usual, passed, found = records.usual(), records.ticks(), list[Recovery]()
    typical = statistics.mean(usual.values()) if usual else 0.0
    hit, clear = sorted((each for each in struck if each.pid is not None), key=lambda each: each.time), True
    for each, until in zip(hit, [*(other.time for other in hit[1:]), float("inf")]):
        before = [(at, tick) for at, tick in passed if at < each.time]
        after = [(at, tick) for at, tick in passed if each.time <= at <= until]
        alone, clear = clear, any(tick >= max((t for _, t in before), default=0) for _, tick in after)
        if not (alone and clear):
            continue
        stretch = [before[-1] if before else (each.time, 0), *after]
        cost = sum(
            _beyond(records, a, b, usual.get(tick % records.ticks_per_step, typical))
            for (a, _), (b, tick) in pairwise(stretch)
        )
        undone = {tick for _, tick in before} & {tick for _, tick in after}
        found.append(Recovery(each, after[0][0] - each.time, cost, len(undone)))
    return found


def _beyond(records: Records, before: float, after: float, usual: float) -> float:
    other = sum(_other_work(record) for at, record in records.seen if before < at <= after)
    return after - before - usual - other


def recovered(records: Records, struck: Sequence[Struck]) -> list[Row]:
    """A row for each kind of fault that did not come amid another's recovery: median and worst."""
    kinds: dict[tuple[str, str], list[Recovery]] = {}
    for each in recoveries(records, struck):
        kinds.setdefault((each.struck.fault.role, each.struck.fault.kind), []).append(each)
    return [_recovery_row(role, kind, those) for (role, kind), those in sorted(kinds.items())]


def _recovery_row(role: str, kind: str, those: Sequence[Recovery]) -> Row:
    undone = [each.undone for each in those]
    value = f"next tick after {_spread([each.next_tick for each in those])} s, costs "
    value += f"{_spread([each.cost for each in those])} s, {_spread(undone)} ticks taken again"
    return Row(f"{kind} {role} ({len(those)})", value, max(undone) <= UNDONE[role] if role in UNDONE else None)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} (worst {max(values):.1f})"


# --- what is left ----------------------------------------------------------------------------------


class Surroundings:
    """What a machine held before; what it holds more afterwards is left behind. `marker`: in our processes' environment."""

    def __init__(self, marker: str):
        self.marker = marker
        self._shared = self._in_shared_memory()

    @staticmethod
    def _in_shared_memory() -> dict[str, str]:
        """Name -> inode."""
        found: dict[str, str] = {}
        for entry in SHARED_MEMORY.iterdir() if SHARED_MEMORY.exists() else ():
            with suppress(FileNotFoundError):
                found[entry.name] = str(entry.stat().st_ino)
        return found

    def processes(self) -> dict[int, str]:
        """Ours, this one not counted: number and command line."""
        found: dict[int, str] = {}
        for pid in psutil.pids():
            entry = Path(f"/proc/{pid}")
            with suppress(OSError):
                if pid != os.getpid() and self.marker.encode() in (entry / "environ").read_bytes():
                    found[pid] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        return found

    @staticmethod
    def _of_others(ours: Collection[int]) -> set[str]:
        """Inodes that living processes that are not ours have mapped: another program's, made meanwhile."""
        found: set[str] = set()
        for pid in psutil.pids():
            with suppress(OSError):
                if pid not in ours:
                    found.update(line.split()[4] for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
        return found

    def left(self) -> list[Row]:
        """Waits up to GONE_S for processes to end."""
        deadline = time.monotonic() + GONE_S
        while (running := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        ports = sum(c.status == psutil.CONN_LISTEN and c.pid in running for c in psutil.net_connections())
        more = self._in_shared_memory().items() - self._shared.items()
        others = self._of_others(running)
        more &= self._in_shared_memory().items()  # what was gone before the others were asked is not left
        shared = {name for name, inode in more if inode not in others}
        return [
            Row("processes left", ", ".join(running.values()) or "none", not running),
            Row("ports left", str(ports or "none"), not ports),
            Row("shared memory left", ", ".join(sorted(shared)) or "none", not shared),
        ]


class Memory:
    """Resident memory of long-lived processes over their lives, every SAMPLE_S at most: `look` from time to time."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.samples: dict[tuple[str, int], list[float]] = {}  # role and process -> MB
        self._next = 0.0

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SAMPLE_S
        for pid, command in self.around.processes().items():
            program = Path(command.split(" ", 1)[0]).name
            role = program if program in ("raylet", "gcs_server") else "driver" if "northstar run" in command else None
            with suppress(psutil.Error):
                if role:
                    self.samples.setdefault((role, pid), []).append(psutil.Process(pid).memory_info().rss / 1e6)

    def rows(self) -> list[Row]:
        """Of each role the process that was looked at most often."""
        found: list[Row] = []
        for role in sorted({role for role, _ in self.samples}):
            samples = max((s for (r, _), s in self.samples.items() if r == role), key=len)
            n = len(samples) // 4
            if n:
                early, late = statistics.median(samples[n : 2 * n]), statistics.median(samples[-n:])
                value = f"{early:.0f} MB in the second quarter, {late:.0f} in the last"
                found.append(Row(f"memory of {role}", value, late <= early * GROWTH + NOISE_MB))
        return found


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.name) for row in rows)
    said = {None: "    ", True: "kept", False: "FAIL"}
    return "\n".join(f"{said[row.kept]}  {row.name:{width}}  {row.value}" for row in rows)


def all_kept(rows: Sequence[Row]) -> bool:
    return all(row.kept is not False for row in rows)
