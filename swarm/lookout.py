"""Waits of one run that take longer than usual: who keeps them waiting is found out, said, and at last given up.

wait begins ──── slow_after ─────────────────────── hung_after ──▶ Hung
                   └ workers say what they are doing   └ stacks of the culprits into the run's folder
                     └ event `slow` names the culprits
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anchor_service.calls import ActorHandle, answered
from anchor_service.errors import Hung
from anchor_service.stacks import stacks_of
from swarm.config import FaultsConfig
from swarm.doing import Doing, culprits
from swarm.pace import Pace
from swarm.progress import Progress

ANSWER_S = 1.0  # a worker says what it is doing within milliseconds, if its process runs at all
STACKS_S = 15.0  # of which Ray may take several to start a process on a busy node


class Lookout:
    """`actors`: those of the run by the names that waits have for them; workers answer `doing`, the others do not."""

    def __init__(
        self,
        faults: FaultsConfig,
        actors: Callable[[], dict[str, ActorHandle[Any]]],
        progress: Progress,
        folder: Path,
        patience: Mapping[str, float] | None = None,
    ):
        self.pace, self.actors, self.progress, self.folder = Pace(faults, patience), actors, progress, folder
        self._said = ""  # what `look_after` has called slow last

    @contextmanager
    def wait(self, kind: str, what: str, limit: tuple[float, str], since: float | None) -> Generator[Overdue]:
        """Around one wait for `what`, asked for at `since` on the monotonic clock, else now: its alarm and deadline.

        What had been asked for long before is judged from now on, and remembered with all the time that it took.
        """
        begin = time.monotonic()
        yield Overdue(self, kind, what, limit, begin)
        self.pace.observe(kind, time.monotonic() - (begin if since is None else since))

    def alarm(self, kind: str, what: str, limit: tuple[float, str]) -> Overdue:
        """Of a wait that begins now, judged by what is usual for its `kind`, and not remembered: others tell how long one took."""
        return Overdue(self, kind, what, limit, time.monotonic())

    def look_after(self, kind: str, who: str, what: str, limit: tuple[float, str], since: float) -> None:
        """Of what nobody waits for, looked at now and then: an event, once, when it is slow. Raises Hung.

        `limit` holds until it is known what is usual, and no longer: nothing is lost by it.
        """
        if self.pace.usual(kind) is not None:
            limit = math.inf, limit[1]
        alarm, waited = Overdue(self, kind, what, limit, since), time.monotonic() - since
        if waited > alarm.seconds:
            raise alarm.over([who])
        if waited > alarm.slow_after and self._said != what:
            self._said = what
            alarm.slow([who])

    def examine(self, missing: Sequence[str]) -> dict[str, str]:
        """Who of them, or behind them, keeps the rest waiting -> what each is doing, in words."""
        actors = self.actors()
        workers = {name for name in actors if name.startswith("worker ")}
        asked = {name: actors[name] for name in missing if name in workers}
        calls = {k: worker.doing.options(concurrency_group="watch").remote() for k, worker in asked.items()}
        doings: dict[str, Doing] = answered(calls, ANSWER_S)
        silent = asked.keys() - doings.keys()
        found = culprits(doings, silent, workers - asked.keys()) if asked else missing
        said = {name: "does not answer" for name in silent} | {name: str(doing) for name, doing in doings.items()}
        return {name: said.get(name, "is not done") for name in found}

    def dump(self, names: Sequence[str]) -> Path:
        """Stacks of these actors, a file each, into a folder of the run."""
        folder, actors = self.folder / "stacks", self.actors()
        folder.mkdir(exist_ok=True)
        for name, text in stacks_of({k: actors[k] for k in names if k in actors}, STACKS_S).items():
            (folder / f"{self.progress.tick}-{name.replace(' ', '-')}.txt").write_text(text)
        return folder


class Overdue:
    """One wait that may become slow, and then too long."""

    def __init__(self, lookout: Lookout, kind: str, what: str, limit: tuple[float, str], begin: float):
        self.lookout, self.what, self.begin = lookout, what, begin
        self.usual, self.slow_after = lookout.pace.usual(kind), lookout.pace.slow_after(kind)
        self.seconds, self.knob = lookout.pace.hung_after(kind, limit)

    def slow(self, missing: Sequence[str]) -> None:
        """An event says who keeps it waiting."""
        found = self.lookout.examine(missing)
        waited, who = time.monotonic() - self.begin, ", ".join(found)
        doing = "; ".join(f"{name} {said}" for name, said in found.items())
        reason = f"{self.what} takes {waited:.1f} s, usually {self.usual:.1f} s: {doing}"
        fields = {"who": who, "what": self.what, "doing": doing, "seconds": waited, "usual": self.usual}
        self.lookout.progress.event("slow", reason=reason, **fields)

    def over(self, missing: Sequence[str]) -> Hung:
        """It is not waited for any longer."""
        found = self.lookout.examine(missing)
        folder = self.lookout.dump([*found])
        doing = "; ".join(f"{name} {said}" for name, said in found.items())
        return Hung(", ".join(found), self.what, self.seconds, self.knob, self.usual, doing, str(folder))
