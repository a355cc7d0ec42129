"""The driver's side of the anchor workers: which fires are under way, in the order of their versions.

start ─▶ worker k: gradient ─▶ publish ─▶ arrived ─▶ (deliver) ─▶ settled: it leaves the line
                                 └─ M̄ ─▶ the next fire's publish, whoever runs it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchor_service.actor import Anchor
from anchor_service.calls import ActorHandle, done_of, gather, several, take
from anchor_service.clock import next_worker
from anchor_service.lag import Due
from anchor_service.messages import FireJob
from anchor_service.ring import RingOverflow
from rl.snapshot import BaseLost


@dataclass
class Fire:
    """A fire under way, or done and not merged yet."""

    due: Due
    worker: int
    report: object  # references, as all that follow
    m_bar: object
    corrections: list[object]  # one a stage
    delivered: bool = False


class FireLine:
    """All fires of a run, by way of its anchor workers."""

    def __init__(self, workers: list[ActorHandle[Anchor]], stages: int, timeout_s: float, bound: int | None):
        self.workers, self.stages, self.timeout_s, self.bound = workers, stages, timeout_s, bound
        self.under_way: dict[int, Fire] = {}
        self.m_bar: object = None
        self._deliveries: list[object] = []

    def free_worker(self, version: int) -> int:
        """Who should run fire `version`."""
        busy = [fire.worker for fire in self.under_way.values() if not fire.delivered]
        return next_worker([busy.count(k) for k in range(len(self.workers))], version)

    def start(self, due: Due, k: int, snapshot: list[object], replay: object, least_seconds: float = 0.0) -> None:
        """Hand one job to worker `k`; waits for nothing. M̄ passes from one fire to the next.

        Raises RingOverflow if more would be under way than the clock's agenda can have.
        """
        if self.bound is not None and len(self.under_way) >= self.bound:
            raise RingOverflow(
                f"versions {sorted(self.under_way)} are under way, {due.version} would be beyond {self.bound}"
            )
        worker = self.workers[k]
        job = FireJob(due.version, due.source_tick, due.first_tick, snapshot, [replay], least_seconds)
        report, m = several(worker.gradient.options(num_returns=2).remote(job))
        published = worker.publish.options(num_returns=2 + self.stages).remote(report, m, self.m_bar)
        report, m_bar, *corrections = several(published)
        self.add(Fire(due, k, report, m_bar, corrections))

    def follow(self, tick: int, references: list[object]) -> None:
        """Weights for every anchor worker, in order before the jobs that start from them; waits for nothing."""
        for worker in self.workers:
            worker.follow.remote(tick, *references)

    def check(self, k: int, references: list[object]) -> None:
        """Weights for worker `k`, before any job. Raises BaseLost if it does not hold what they are a delta against."""
        call = self.workers[k].follow.remote(0, *references)
        gather([(f"anchor {k}", call)], "its first weights", self.timeout_s, "anchor.timeout_s")

    def add(self, fire: Fire) -> None:
        self.under_way[fire.due.version] = fire
        self.m_bar = fire.m_bar

    def drop(self, fire: Fire, m_bar: object) -> None:
        """Forget a fire that failed; M̄ goes on from the fire before it, or from `m_bar` if that is merged."""
        del self.under_way[fire.due.version]
        earlier = [v for v in self.under_way if v < fire.due.version]
        self.m_bar = self.under_way[max(earlier)].m_bar if earlier else m_bar

    def arrived(self) -> list[Fire]:
        """Fires that are done and not delivered yet, oldest first; waits for nothing."""
        waiting = {fire.report: fire for fire in self.under_way.values() if not fire.delivered}
        done, _ = done_of(list(waiting))
        return sorted((waiting[ref] for ref in done), key=lambda fire: fire.due.version)

    def deliver(self, fire: Fire, ranks: Sequence[ActorHandle[Any]]) -> None:
        """Send each rank its stage's correction, beside whatever tick is running; waits for nothing."""
        fire.delivered = True
        for index, rank in enumerate(ranks):
            reference = [fire.corrections[index % self.stages]]
            self._deliveries.append(rank.deliver.options(concurrency_group="inbox").remote(fire.due.version, reference))

    def check_deliveries(self) -> None:
        """Raises what a delivery that is over raised; waits for nothing."""
        done, self._deliveries = done_of(self._deliveries)
        for delivery in done:
            take(delivery, "a worker", "the arrival of a correction")

    def report(self, fire: Fire) -> dict[str, Any]:
        """Raises WaitTimeout if the fire is not done in time."""
        what = f"the report of correction {fire.due.version}"
        (report,) = gather([("the anchor", fire.report)], what, self.timeout_s, "anchor.timeout_s")
        return report

    def good(self, fire: Fire) -> bool:
        """Of a fire that is done: whether it has a correction. One that lost its base is dropped in the next tick."""
        try:
            self.report(fire)
        except BaseLost:
            return False
        return True

    def settled(self, version: int) -> list[Fire]:
        """Fires up to `version`, oldest first; they leave the line."""
        return [self.under_way.pop(v) for v in sorted(self.under_way) if v <= version]


class NoFires(FireLine):
    """Of a run without corrections: nothing starts, so nothing is ever under way."""

    def __init__(self) -> None:
        super().__init__([], 0, 0.0, bound=0)
