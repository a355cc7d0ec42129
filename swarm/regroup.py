"""The workers meet again after some were lost, or where their number is to change.

    failure ─▶ who is there? ─▶ reunion: from which replica, from which tick ─▶ policy ─▶ others in the place of the lost
            ─▶ a new grid, all process groups new ─▶ state of a whole replica to those that are not ─▶ their share of the step

Nothing is read from a disk. Where no other worker can be had in time, a replica less goes on, until there is one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from anchor_service.calls import gather, replies
from anchor_service.errors import ARGUMENT, ActorLost, WaitTimeout, described
from anchor_service.line import FireLine
from swarm.blame import blamed
from swarm.failure_policy import Decision, Failure, FailurePolicy, Status
from swarm.fleet import Fleet
from swarm.grid import PeerLost
from swarm.messages import Standing, TickReport
from swarm.progress import Progress
from swarm.reunion import Reunion, reunion
from swarm.run_config import RunConfig
from swarm.spares import Handle, Spares

LOST = ActorLost, WaitTimeout, PeerLost
SPARE_S, AT_ONCE_S = 60.0, 0.5  # for another process; where nothing is gained by waiting no longer than a fork may take


@dataclass(frozen=True)
class Met:
    """What came of it."""

    done: int  # ticks that count as taken
    reports: list[TickReport]  # of the last of them, by whoever is left that took it
    fresh: list[int]  # ranks that have no share of the present step
    dealt_anew: bool  # whether there are more or fewer replicas than before


class Regroup:
    """One run's workers. `line`: corrections on their way to them."""

    def __init__(self, config: RunConfig, fleet: Fleet, progress: Progress, policy: FailurePolicy, line: FireLine):
        self.config, self.fleet, self.progress, self.policy, self.line = config, fleet, progress, policy, line
        self.pp, self.wanted = config.swarm.pp, config.swarm.dp
        self.spares = Spares(fleet.new_worker, fleet.dismiss)

    @property
    def dp(self) -> int:
        return len(self.fleet.workers) // self.pp

    # --- after a failure ------------------------------------------------------------------------

    def after(self, failure: Exception, tick: int) -> Met:
        """`failure` was met while `tick` was to be taken, or after it. Raises it if the run cannot go on from here."""
        start, fresh = time.monotonic(), set[int]()
        while True:
            blames = blamed(failure, self.pp)
            if any(blame.role != "worker" for blame in blames) or not (blames or isinstance(failure, PeerLost)):
                raise failure
            standings = self._standings({blame.index for blame in blames if blame.index is not None}, fresh)
            plan = reunion(standings, self.pp, tick)
            if plan is None or not (
                (plan.exact and not self._loses_stream(fresh)) or self.config.anchor.clock == "wall"
            ):
                raise failure  # in lockstep a run ends in the same bits whatever died: it goes back to its checkpoint
            kind = blames[0].failure if blames else Failure.DEATH
            if self.policy.decide(Status("worker", kind, tick)) is not Decision.REGROUP:
                raise failure
            try:
                dealt_anew = self._meet(plan, fresh)
            except LOST as another:
                failure = another
                continue
            break
        taken = [s.report for s in standings if s and s.done == tick and s.report] if plan.done == tick else []
        self._said(described(failure), fresh, plan.done, plan.exact, time.monotonic() - start)
        return Met(plan.done, taken, sorted(fresh), dealt_anew)

    def _standings(self, named: set[int], fresh: set[int]) -> list[Standing | None]:
        """Of every rank; None: lost, and another has been started in its place. Ranks that are `named` are replaced
        whatever they say: a newcomer too, if it failed on the way."""
        for rank in sorted(named):
            self._renew(rank, fresh)
        ranks = [rank for rank in range(len(self.fleet.workers)) if rank not in fresh]
        calls = [(self.fleet.swarm.name_of(r), self.fleet.workers[r].standing.remote()) for r in ranks]
        said = dict(zip(ranks, replies(calls, "where it stands", *self.fleet.swarm_limit)))
        for rank, answer in said.items():
            if isinstance(answer, Exception):
                self._renew(rank, fresh)
        return [s if isinstance(s := said.get(r), Standing) else None for r in range(len(self.fleet.workers))]

    def _renew(self, rank: int, fresh: set[int]) -> None:
        """A spare in its place, if there is one; what starts in its place then is a spare."""
        newcomer, taken = self.fleet.new_worker(self.fleet.workers[rank]), self.spares.take()
        if taken is not None:
            self.spares.add([newcomer])
        self.fleet.workers[rank] = taken or newcomer
        fresh.add(rank)

    def _loses_stream(self, fresh: set[int]) -> bool:
        """Whether engines would hold weights that an undisturbed run has not: a coded stream begins anew with exact ones."""
        return self.config.snapshot.rate is not None and any(rank < self.pp for rank in fresh)

    # --- meeting --------------------------------------------------------------------------------

    def _meet(self, plan: Reunion, fresh: set[int]) -> bool:
        """Returns whether the number of replicas has changed."""
        missing = self._not_ready(fresh)
        dp = self.dp
        if missing:
            plan = self._without({rank // self.pp for rank in missing}, plan, fresh, missing)
        backs = [rank // self.pp in plan.back for rank in range(len(self.fleet.workers))]
        self._join(fresh, backs)
        self._copy(plan.source, plan.copies, plan.done)
        self._deliver(fresh)
        return self.dp != dp

    def _not_ready(self, fresh: set[int]) -> list[int]:
        """Ranks for which no other worker could be had in time."""
        ranks = sorted(fresh)
        calls = [(self.fleet.swarm.name_of(r), self.fleet.workers[r].__ray_ready__.remote()) for r in ranks]
        said = replies(calls, "another process", self._patience(fresh), "faults.spare_s")
        return [rank for rank, answer in zip(ranks, said) if isinstance(answer, Exception)]

    def _patience(self, fresh: set[int]) -> float:
        """Seconds for which the others wait for those that are `fresh`."""
        rest = self.dp - len({rank // self.pp for rank in fresh})
        at_once = self.config.anchor.clock == "wall" and rest > 1 and self.can_share(rest)  # one alone has no twin
        return self.config.faults.spare_s or (AT_ONCE_S if at_once else SPARE_S)

    def _without(self, replicas: set[int], plan: Reunion, fresh: set[int], missing: list[int]) -> Reunion:
        """Drop replicas whose places stay empty: what is there of them waits to be taken in again."""
        workers, pp = self.fleet.workers, self.pp
        kept = [d for d in range(self.dp) if d not in replicas]
        if not (kept and self.can_share(len(kept))):
            who = ", ".join(self.fleet.swarm.name_of(rank) for rank in missing)
            raise WaitTimeout(who, "another process", self._patience(fresh), "faults.spare_s")
        for d in sorted(replicas):
            self.spares.add(workers[d * pp : (d + 1) * pp])
        number = {d: i for i, d in enumerate(kept)}
        workers[:] = [workers[d * pp + p] for d in kept for p in range(pp)]
        moved = {number[r // pp] * pp + r % pp for r in fresh if r // pp in number}
        fresh.clear()
        fresh |= moved
        self.progress.event("replica missing", replicas=len(kept), reason=f"no process for {len(missing)} workers")
        copies = tuple(number[d] for d in plan.copies if d in number)
        back = tuple(number[d] for d in plan.back if d in number)
        return Reunion(plan.done, number[plan.source], copies, back, plan.exact)

    def _join(self, fresh: set[int], backs: Sequence[bool]) -> None:
        """All ranks into one new grid; those that are fresh load the model."""
        fleet, dp = self.fleet, self.dp
        limit = fleet.swarm.start_timeout_s, "swarm.start_timeout_s"
        (init,) = gather([("worker d0p0", fleet.workers[0].address.remote())], "its address", *limit)
        calls = []
        for rank, worker in enumerate(fleet.workers):
            call = (
                worker.build.remote(init, rank, dp)
                if rank in fresh
                else worker.meet.remote(rank, dp, init, backs[rank])
            )
            calls.append((fleet.swarm.name_of(rank), call))
        try:
            gather(calls, "its place in the new grid", *limit)
        except LOST:
            fleet.workers[0].adjourn.options(concurrency_group="watch").remote()  # nobody waits for who is lost
            raise
        fleet.nodes([fleet.workers[rank] for rank in sorted(fresh)])

    def _copy(self, source: int, copies: Sequence[int], done: int) -> None:
        """State of one replica to others, stage by stage."""
        if not copies:
            return
        own = [self.fleet.workers[source * self.pp + p].copied.remote() for p in range(self.pp)]
        frames = {d * self.pp + p: own[p] for p in range(self.pp) for d in copies}
        self._become(frames, done, "the state of a twin")

    def _become(self, frames: Mapping[int, object], done: int, what: str) -> None:
        """Each of these ranks goes on after `done` ticks from a state."""
        fleet = self.fleet
        calls = [(fleet.swarm.name_of(rank), fleet.workers[rank].become.remote(f, done)) for rank, f in frames.items()]
        try:
            nbytes = sum(gather(calls, what, *fleet.swarm_limit))
        except ActorLost as failure:
            if failure.who.startswith(ARGUMENT):  # of whoever has the state: another worker, which will not answer
                raise PeerLost(str(failure)) from failure
            raise
        self.progress.control(nbytes, 0)

    def _deliver(self, ranks: Collection[int]) -> None:
        """Corrections that the others have got already."""
        for fire in self.line.delivered():
            self.line.deliver_to(fire, {rank: self.fleet.workers[rank] for rank in ranks})

    def _said(self, reason: str, fresh: Collection[int], done: int, exact: bool, seconds: float) -> None:
        who = ", ".join(self.fleet.swarm.name_of(rank) for rank in sorted(fresh)) or "nobody"
        self.progress.event("workers regrouped", reason=reason, renewed=who, done=done, exact=exact, seconds=seconds)

    # --- in the place of those that leave ---------------------------------------------------------

    def replace(self, others: Mapping[int, Handle], reason: str) -> None:
        """Others, which are there, in the place of these ranks, between two steps: each gets all that the one before it has."""
        start, fleet, tick = time.monotonic(), self.fleet, self.progress.tick
        before = {rank: fleet.workers[rank] for rank in others}
        frames = {rank: handle.copied.remote(True) for rank, handle in before.items()}
        for rank, other in others.items():
            fleet.workers[rank] = other
        try:
            self._join(set(others), [False] * len(fleet.workers))
            self._become(frames, tick, "the state of the one before it")
        finally:
            for handle in before.values():
                fleet.dismiss(handle)
        self._deliver(others)
        self._said(reason, others, tick, True, time.monotonic() - start)

    def give_up(self, replicas: Sequence[int], leaving: Sequence[int], others: Sequence[Handle], reason: str) -> None:
        """Go on without replicas some of whose ranks are `leaving`; `others` in the place of those, and the rest of them, wait
        to be taken in again."""
        gone = {rank: w for rank, w in enumerate(self.fleet.workers) if rank // self.pp in replicas}
        self.fleet.workers[:] = [w for rank, w in enumerate(self.fleet.workers) if rank not in gone]
        self.spares.add([*(worker for rank, worker in gone.items() if rank not in leaving), *others])
        for rank in leaving:
            self.fleet.dismiss(gone[rank])
        self._join(set(), [False] * len(self.fleet.workers))
        self.progress.event("replica missing", replicas=self.dp, reason=reason)

    def can_share(self, replicas: int) -> bool:
        """Whether so many have equal shares of a tick's samples."""
        grpo = self.config.grpo
        return grpo.ppo_mini_batch_size * grpo.group_size % replicas == 0

    # --- another number of replicas -------------------------------------------------------------

    def between_steps(self, wanted: int | None) -> None:
        """Take in what has become ready; go towards `wanted` replicas, or stay."""
        try:
            self._towards(wanted)
        except LOST as failure:  # somebody was lost on the way, or before
            self.after(failure, self.progress.tick)

    def _towards(self, wanted: int | None) -> None:
        if wanted is not None and wanted != self.wanted:
            self.wanted = wanted
            self._retire(wanted)
        self.spares.look((self.wanted - self.dp) * self.pp + self.config.faults.spares)
        ready = self.spares.ready()
        count = min(len(ready) // self.pp, self.wanted - self.dp)
        while count > 0 and not self.can_share(self.dp + count):
            count -= 1
        if count > 0:
            self._take_in(ready[: count * self.pp])

    def _retire(self, wanted: int) -> None:
        workers, keep = self.fleet.workers, wanted * self.pp
        if len(workers) <= keep:
            return
        for handle in workers[keep:]:
            self.fleet.dismiss(handle)
        del workers[keep:]
        self._join(set(), [False] * len(workers))
        self.progress.event("replicas changed", replicas=self.dp)

    def _take_in(self, handles: Sequence[Handle]) -> None:
        first = self.dp
        self.spares.leave(handles)
        self.fleet.workers.extend(handles)
        self._join(set(range(first * self.pp, len(self.fleet.workers))), [False] * len(self.fleet.workers))
        self._copy(0, range(first, self.dp), self.progress.tick)
        self._deliver(range(first * self.pp, len(self.fleet.workers)))
        self.progress.event("replicas changed", replicas=self.dp)
