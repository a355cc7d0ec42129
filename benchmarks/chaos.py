"""Faults for a run, from outside: signals to its real processes, at moments that its own records tell.

    kill worker 1 at 3.4              SIGKILL, 0.4 of a tick's usual time after tick 3 was completed
    hang engine 0 at 5                SIGSTOP, for ever
    pause anchor 0 for 2 at 5.5       SIGSTOP, and SIGCONT after 2 s
    kill node 1 at 8.2                its raylet and all that runs there
    kill driver at checkpoint 4       while the checkpoint of step 4 is being written

Which process is which is in the run folder's `processes.json`, what is completed in its `metrics.jsonl`.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from swarm.run_config import RunConfig

LOOK_S = 0.003  # how often the records are looked at: a checkpoint is being written for 20 ms
FIND_S = 120.0  # so long is waited for a process that is not there yet
_FAULT = re.compile(r"(kill|hang|pause) (\w+)(?: (\d+))?(?: for ([\d.]+))? at (checkpoint (\d+)|[\d.]+)")


@dataclass(frozen=True)
class Fault:
    """What is done to whom, and when: after so many ticks, or in the checkpoint of a step."""

    kind: str
    role: str
    index: int
    when: float
    in_checkpoint: bool = False
    seconds: float = 0.0  # of a pause

    @staticmethod
    def parse(text: str) -> Fault:
        """As the table above has it."""
        found = _FAULT.fullmatch(text)
        if not found:
            raise ValueError(f"{text!r} is no fault: `kill worker 1 at 3.4`, `pause anchor 0 for 2 at checkpoint 4`")
        kind, role, index, seconds, when, step = found.groups()
        return Fault(kind, role, int(index or 0), float(step or when), bool(step), float(seconds or 0))

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g}" if self.kind == "pause" else ""
        when = f"checkpoint {self.when:g}" if self.in_checkpoint else f"{self.when:.2f}"
        return f"{self.kind} {self.role} {self.index}{lasting} at {when}"


def random_faults(
    seed: int, n: int, config: RunConfig, weights: dict[str, float], nodes: int = 1, in_checkpoint: float = 0.1
) -> list[Fault]:
    """`n` of them, at moments uniform over all but the first and the last tick; a share of them in a checkpoint instead.

    `weights`: how often each kind and role comes, for example {"kill engine": 2, "pause worker": 1}.
    """
    swarm, steps, every = config.swarm, config.run.steps, config.run.checkpoint_every
    counts = {"worker": swarm.dp * swarm.pp, "engine": config.rollout.replicas, "anchor": config.anchor.workers}
    saved = range(every, steps, every) if every else ()
    rng, found = random.Random(seed), list[Fault]()
    for what in rng.choices(list(weights), list(weights.values()), k=n):
        kind, role = what.split()
        index = rng.randrange((counts | {"node": nodes}).get(role, 1))
        inside = bool(saved) and rng.random() < in_checkpoint
        when = float(rng.choice(saved)) if inside else rng.uniform(1, steps * config.grpo.ticks_per_step - 1)
        seconds = round(rng.uniform(0.5, 5.0), 1) if kind == "pause" else 0.0
        found.append(Fault(kind, role, index, when, inside, seconds))
    return found


@dataclass(frozen=True)
class Struck:
    """A fault that was carried out, or found nobody (pid None)."""

    fault: Fault
    time: float  # on the wall clock, seconds
    tick: int  # the last one completed
    pid: int | None


class Records:
    """A run's metrics.jsonl, followed while it is written, and when it is put together again after a rewind."""

    def __init__(self, run: Path, ticks_per_step: int):
        self.run, self.ticks_per_step = run, ticks_per_step
        self.seen: list[tuple[float, dict[str, Any]]] = []  # when each record came, those undone later included
        self.tick = 0  # the newest that was ever completed
        self._lines: set[str] = set()
        self._file, self._at, self._rest = -1, 0, ""

    def look(self) -> None:
        """Take in what was written since."""
        path = self.run / "metrics.jsonl"
        try:
            now = path.stat()
        except FileNotFoundError:
            return
        if now.st_ino != self._file or now.st_size < self._at:
            self._file, self._at, self._rest = now.st_ino, 0, ""
        if now.st_size == self._at:
            return
        with path.open() as file:
            file.seek(self._at)
            text = file.read()
            self._at = file.tell()
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if line not in self._lines:
                self._lines.add(line)
                self._take(line)

    def _take(self, line: str) -> None:
        with suppress(ValueError):  # cut by a death
            record = json.loads(line)
            self.seen.append((time.time(), record))
            if record["kind"] == "tick":
                self.tick = max(self.tick, record["tick"])

    def ticks(self) -> list[tuple[float, int]]:
        """When each was completed, as often as it was."""
        return [(at, record["tick"]) for at, record in self.seen if record["kind"] == "tick"]

    def usual(self) -> dict[int, float]:
        """Median seconds from the tick before to the one that is so many beyond a multiple of a step's."""
        found: dict[int, list[float]] = defaultdict(list)
        passed = self.ticks()
        for (before, earlier), (after, tick) in pairwise(passed):
            if tick == earlier + 1 and not self._between(before, after):
                found[tick % self.ticks_per_step].append(after - before)
        return {phase: statistics.median(seconds) for phase, seconds in found.items()}

    def _between(self, before: float, after: float) -> bool:
        """Whether something other than ticks was made there."""
        kinds = [r for at, r in self.seen if before < at < after and r["kind"] in ("val", "event")]
        return bool(kinds)


class Injector:
    """Carries faults out beside a run, in a thread of its own. As a context it ends with what it stopped going on.

    `kill_node`: ends the raylet of that index, and gives its process; None: the run has a cluster of its own.
    """

    def __init__(
        self,
        run: Path,
        faults: Sequence[Fault],
        ticks_per_step: int,
        kill_node: Callable[[int], int | None] | None = None,
    ):
        self.records, self.kill_node = Records(run, ticks_per_step), kill_node
        self.left = sorted(faults, key=lambda fault: fault.when * (ticks_per_step if fault.in_checkpoint else 1))
        self.struck: list[Struck] = []
        self._stopped: dict[int, float] = {}  # process -> when it goes on
        self._due: dict[Fault, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Injector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._go_on(float("inf"))
        self.records.look()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self.records.look()
            self._go_on(time.time())
            for fault in [fault for fault in self.left if self._is_due(fault)]:
                self._strike(fault)

    def _go_on(self, until: float) -> None:
        for pid in [pid for pid, at in self._stopped.items() if at <= until]:
            del self._stopped[pid]
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _is_due(self, fault: Fault) -> bool:
        records = self.records
        if fault.in_checkpoint:
            return (records.run / "checkpoints" / f"step-{int(fault.when):06d}.partial").exists()
        after = int(fault.when)
        if records.tick < after:
            return False
        if fault not in self._due:
            usual = records.usual()
            seconds = usual.get((after + 1) % records.ticks_per_step, max(usual.values(), default=0.5))
            self._due[fault] = time.time() + (fault.when - after) * seconds
        return time.time() >= self._due[fault]

    def _strike(self, fault: Fault) -> None:
        pid = self._process(fault)
        since = self._due.setdefault(fault, time.time())
        if pid is None and time.time() < since + FIND_S and not fault.in_checkpoint:
            return  # it is on its way: tried again at the next look
        self.left.remove(fault)
        if pid is not None and not (fault.role == "node" and self.kill_node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        if pid is not None and fault.kind != "kill":
            self._stopped[pid] = time.time() + fault.seconds if fault.kind == "pause" else float("inf")
        self.struck.append(Struck(fault, time.time(), self.records.tick, pid))

    def _process(self, fault: Fault) -> int | None:
        """None: it is not there now."""
        if fault.role == "node" and self.kill_node:
            return self.kill_node(fault.index)
        try:
            listed = json.loads((self.records.run / "processes.json").read_text())
        except (OSError, ValueError):
            return None
        at_once = {(each["role"], each["index"]): each["pid"] for each in listed}
        if fault.role in ("node", "gcs"):
            return _child(at_once["driver", 0], {"node": "raylet", "gcs": "gcs_server"}[fault.role])
        pid = at_once.get((fault.role, fault.index))
        return pid if pid is not None and _is_ours(pid, fault.role) else None


def _is_ours(pid: int, role: str) -> bool:
    """A number may have gone to another process since."""
    with suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        return bool(title) and (title.startswith(b"ray::") if role != "driver" else b"northstar" in title)
    return False


def _child(parent: int, name: str) -> int | None:
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            stat = (entry / "stat").read_text() if entry.name.isdigit() else ""
            if f"({name})" in stat and int(stat.rpartition(")")[2].split()[1]) == parent:
                return int(entry.name)
    return None
