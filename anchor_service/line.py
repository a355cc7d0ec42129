"""The driver's side of the anchor workers: which fires are under way, in the order of their versions.

start ─▶ worker k: gradient ─▶ publish ─▶ arrived ─▶ (deliver) ─▶ settled: it leaves the line
                                 └─ M̄ ─▶ the next fire's publish, whoever runs it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anchor_service.actor import Anchor
from anchor_service.calls import ActorHandle, Alarm, done_of, gather, raised, several
from anchor_service.clock import next_worker
from anchor_service.errors import ActorLost
from anchor_service.lag import Due
from anchor_service.messages import FireJob
from anchor_service.ring import RingOverflow

_RANK = "a worker"


@dataclass
class Fire:
    """A fire under way, or done and not merged yet."""

    due: Due
    worker: int
    report: object  # references, as all that follow
    m_bar: object
    corrections: list[list[object]]  # a frame a stage, or its head and the frame
    delivered: bool = False
    job: FireJob | None = None  # None: it was done before this run went on
    gradient: tuple[object, object] = (None, None)  # its report, and M
    since: float = 0.0  # on the monotonic clock: when it was asked for
    whole: bool = False  # it was delivered whole, where ranks may do with the head


class FireLine:
    """All fires of a run, by way of its anchor workers. `parts`: objects that a stage's correction is published as."""

    def __init__(
        self, workers: list[ActorHandle[Anchor]], stages: int, parts: int, timeout_s: float, bound: int | None
    ):
        self.workers, self.stages, self.parts, self.timeout_s, self.bound = workers, stages, parts, timeout_s, bound
        self.under_way: dict[int, Fire] = {}
        self.m_bar: object = None
        self.away: set[int] = set()  # workers that get no job: dead, or on their way back
        self._deliveries: list[object] = []

    @property
    def present(self) -> list[ActorHandle[Anchor]]:
        return [worker for k, worker in enumerate(self.workers) if k not in self.away]

    def free_worker(self, version: int) -> int:
        """Who should run fire `version`, of those that are there."""
        there = [k for k in range(len(self.workers)) if k not in self.away]
        busy = [fire.worker for fire in self.under_way.values() if not fire.delivered]
        return there[next_worker([busy.count(k) for k in there], version)]

    def start(self, due: Due, k: int, snapshot: list[object], replay: object, least_seconds: float = 0.0) -> None:
        """Hand one job to worker `k`; waits for nothing. M̄ passes from one fire to the next.

        Raises RingOverflow if more would be under way than the clock's agenda can have.
        """
        if self.bound is not None and len(self.under_way) >= self.bound:
            raise RingOverflow(
                f"versions {sorted(self.under_way)} are under way, {due.version} would be beyond {self.bound}"
            )
        fire = Fire(due, k, None, None, [])
        fire.job = FireJob(due.version, due.source_tick, due.first_tick, snapshot, [replay], least_seconds)
        self._ask(fire, fire.job)
        self._publish(fire)
        self.add(fire)

    def _ask(self, fire: Fire, job: FireJob) -> None:
        report, m = several(self.workers[fire.worker].gradient.options(num_returns=2).remote(job))
        fire.gradient, fire.since = (report, m), time.monotonic()

    def _publish(self, fire: Fire) -> None:
        """M̄ is that of the fire before it, which `m_bar` refers to."""
        call = self.workers[fire.worker].publish.options(num_returns=2 + self.stages * self.parts)
        fire.report, fire.m_bar, *corrections = several(call.remote(*fire.gradient, self.m_bar))
        fire.corrections = [corrections[i : i + self.parts] for i in range(0, len(corrections), self.parts)]

    def follow(self, tick: int, references: list[object]) -> None:
        """Weights for every anchor worker, in order before the jobs that start from them; waits for nothing."""
        for worker in self.present:
            worker.follow.remote(tick, *references)

    def check(self, k: int, references: list[object]) -> None:
        """Weights for worker `k`, before any job. Raises BaseLost if it does not hold what they are a delta against."""
        call = self.workers[k].follow.remote(0, *references)
        gather([(f"anchor {k}", call)], "its first weights", self.timeout_s, "anchor.timeout_s")

    def add(self, fire: Fire) -> None:
        self.under_way[fire.due.version] = fire
        self.m_bar = fire.m_bar

    def drop(self, fires: list[Fire], m_bar: object) -> None:
        """Forget fires that are void. M̄ goes on from `m_bar`, which is that before the first of them."""
        for fire in fires:
            del self.under_way[fire.due.version]
        self.publish_again(min((fire.due.version for fire in fires), default=1 + max(self.under_way, default=0)), m_bar)

    def before(self, version: int, settled: object) -> object:
        """M̄ before fire `version`; `settled`: that of the last fire that left the line."""
        earlier = [v for v in self.under_way if v < version]
        return self.under_way[max(earlier)].m_bar if earlier else settled

    def publish_again(self, first: int, m_bar: object) -> None:
        """All fires from version `first` on, after an M̄ of `m_bar`: what they were to get has come to nothing.

        One that was done before this run went on stays as it is: its M is gone.
        """
        self.m_bar = m_bar
        for fire in [self.under_way[v] for v in sorted(self.under_way) if v >= first]:
            if fire.job is not None:
                fire.since = time.monotonic()
                self._publish(fire)
            self.m_bar = fire.m_bar

    def carry(self, move: Callable[[object], object], settled: object) -> object:
        """All that is made and may still be wanted, by `move` to another node; returns what `settled`, an M̄, is then."""
        fires = [fire for fire in self.under_way.values() if self.good(fire)]
        ready = [settled, *(fire.m_bar for fire in fires)]
        moved = {made: move(made) for made in dict.fromkeys(ready) if made is not None}
        for fire in fires:
            fire.m_bar = moved.get(fire.m_bar)
            fire.corrections = [[move(part) for part in parts] for parts in fire.corrections]
        self.m_bar = moved.get(self.m_bar, self.m_bar)
        return moved.get(settled)

    def owed(self, k: int) -> list[Fire]:
        """Fires that worker `k` is still to deliver, oldest first."""
        fires = [self.under_way[v] for v in sorted(self.under_way)]
        return [f for f in fires if f.worker == k and f.job and not f.delivered and not self.good(f)]

    def start_again(self, k: int, frames: list[tuple[int, list[object]]], whole: list[object], m_bar: object) -> None:
        """Every fire that worker `k` owes, on the newcomer in its place, and M̄ of all that follow.

        `frames`: of its stream, with their ticks, from the oldest source on; `whole`: what the stream holds after the
        newest, or nothing where every frame is whole. `m_bar`: of the last fire that left the line.
        """
        worker, owed = self.workers[k], self.owed(k)
        for i, (tick, references) in enumerate(frames):
            if i == 0 and whole:
                back = [reference for _, later in reversed(frames[1:]) for reference in later]
                worker.catch_up.remote(frames[-1][0], *whole, *back)
            else:
                worker.follow.remote(tick, *references)
            for fire in owed:
                if fire.job and fire.due.source_tick == tick:
                    self._ask(fire, replace(fire.job, snapshot=[]))
        first = owed[0].due.version
        self.publish_again(first, self.before(first, m_bar))

    def arrived(self) -> list[Fire]:
        """Fires that are done and not delivered yet, oldest first; waits for nothing."""
        waiting = {fire.report: fire for fire in self.under_way.values() if not fire.delivered}
        done, _ = done_of(list(waiting))
        return sorted((waiting[ref] for ref in done), key=lambda fire: fire.due.version)

    def oldest(self) -> Fire | None:
        """Of those that are not done: all others wait for its M̄. None where there are none."""
        arrived = {fire.due.version for fire in self.arrived()}
        waiting = [fire for fire in self.under_way.values() if not fire.delivered and fire.due.version not in arrived]
        return min(waiting, key=lambda fire: fire.due.version, default=None)

    def deliver(self, fire: Fire, ranks: Sequence[ActorHandle[Any]], whole: bool) -> None:
        """Send each rank its stage's correction, beside whatever tick is running; waits for nothing.

        `whole`: behind a head, too, what is merged; else ranks fetch that in the tick in which they want it.
        """
        fire.delivered, fire.whole = True, whole
        self.deliver_to(fire, dict(enumerate(ranks)))

    def delivered(self) -> list[Fire]:
        """Fires that are on their way to the ranks, or with some of them, oldest first."""
        return [fire for _, fire in sorted(self.under_way.items()) if fire.delivered]

    def deliver_to(self, fire: Fire, ranks: Mapping[int, ActorHandle[Any]]) -> None:
        """As it was delivered to the others."""
        for index, rank in ranks.items():
            said = fire.due.version, fire.corrections[index % self.stages], fire.whole
            self._deliveries.append(rank.deliver.options(concurrency_group="inbox").remote(*said))

    def check_deliveries(self) -> list[Exception]:
        """Of deliveries that are over, what was lost with the node that it lay on; of a rank that is gone its next tick
        says so. Raises what else one raised."""
        done, self._deliveries = done_of(self._deliveries)
        found = [raised(delivery, _RANK, "the arrival of a correction") for delivery in done]
        for error in found:
            if error and not isinstance(error, ActorLost):
                raise error
        return [error for error in found if isinstance(error, ActorLost) and error.who != _RANK]

    def overdue(self, now: float) -> list[Fire]:
        """Fires that take longer than `timeout_s`, oldest first."""
        limit = {v: f.since + self.timeout_s + f.job.least_seconds for v, f in self.under_way.items() if f.job}
        late = [self.under_way[v] for v in sorted(limit) if now > limit[v]]
        return [fire for fire in late if not fire.delivered and not done_of([fire.report])[0]]

    def report(self, fire: Fire, alarm: Alarm | None = None) -> dict[str, Any]:
        """Raises WaitTimeout, or what the `alarm` makes of it, if the fire is not done in time."""
        limit = (alarm.seconds, alarm.knob) if alarm else (self.timeout_s, "anchor.timeout_s")
        call, what = (f"anchor {fire.worker}", fire.report), f"the report of correction {fire.due.version}"
        (report,) = gather([call], what, *limit, alarm=alarm)
        return report

    def good(self, fire: Fire) -> bool:
        """Whether it is done and has a correction; waits for nothing."""
        return bool(done_of([fire.report])[0]) and raised(fire.report, f"anchor {fire.worker}") is None

    def settled(self, version: int) -> list[Fire]:
        """Fires up to `version`, oldest first; they leave the line."""
        return [self.under_way.pop(v) for v in sorted(self.under_way) if v <= version]


class NoFires(FireLine):
    """Of a run without corrections: nothing starts, so nothing is ever under way."""

    def __init__(self) -> None:
        super().__init__([], 0, 1, 0.0, bound=0)
