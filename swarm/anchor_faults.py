"""Anchor workers that die, hang or lose their base: what becomes of their fires, and who takes their place.

lockstep   a newcomer gets what its stream holds, whole, taken back to the oldest fire that was under way; then every
           fire runs again, on the same weights, samples and M̄: the same bits
wall       the fires are void, a newcomer starts in the background and gets no job before it is ready; nothing waits
"""

from __future__ import annotations

import time
from collections.abc import Callable

from anchor_service.actor import Anchor
from anchor_service.calls import ActorHandle, done_of, lost, raised, take
from anchor_service.clock import Clock
from anchor_service.errors import SWARM, ActorLost, WaitTimeout, described
from anchor_service.line import Fire, FireLine
from anchor_service.places import carried
from rl.snapshot import BaseLost
from swarm.engine_line import EngineLine
from swarm.failure_policy import Decision, FailurePolicy, Status, failure_of
from swarm.fleet import Fleet
from swarm.pace import FIRE
from swarm.progress import Progress
from swarm.replay_choice import Choice
from swarm.run_config import RunConfig

HANDLED = (BaseLost, ActorLost, WaitTimeout)


class AnchorFaults:
    """Looks after the workers of `line`. `engines`: whose stream of weights they may share."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        progress: Progress,
        line: FireLine,
        clock: Clock,
        choice: Choice,
        engines: EngineLine,
        policy: FailurePolicy,
    ):
        self.config, self.fleet, self.progress, self.line, self.clock = config, fleet, progress, line, clock
        self.choice, self.engines, self.policy = choice, engines, policy
        self.begin_whole: set[str] = set()  # streams whose next frame must be whole
        self.begun: dict[str, int] = {}  # in lockstep, of each stream: ticks after which its last whole frame was sent
        self.m_bar: object = None  # of the last fire that left the line
        # newcomers: when they are ready, and since when they start
        self._starting: dict[int, tuple[object, float]] = {}
        self._shared = config.anchor.weights == "shared"

    def lose(self, worker: int, reason: Exception) -> None:
        """A worker that is there has lost the base of its stream."""
        self.progress.event("snapshot lost", stream=stream_of(worker), reason=str(reason))
        self._begin_whole(worker)

    def _begin_whole(self, worker: int) -> None:
        """In a shared stream it gets at once what the others hold: they go on as before."""
        if not self._shared:
            self.begin_whole.add(stream_of(worker))
        elif self.engines.sent:
            references, nbytes = self.engines.whole()
            self.progress.ledger.add("snapshot", nbytes, 0)
            self.line.workers[worker].follow.remote(self.engines.sent[-1].tick, *references)

    # --- one that leaves -------------------------------------------------------------------------

    def may_leave(self, k: int) -> bool:
        """Whether worker `k` owes nothing. On the wall clock it gets no job from now on."""
        if k in self._starting:
            return False
        if not self.clock.waits and k not in self.line.away:
            self._goes(k)
        return not self.line.owed(k)

    def replace(self, k: int, newcomer: ActorHandle[Anchor], reason: str) -> None:
        """One that is ready in the place of worker `k`, which may leave: what that has made lies where it was made."""
        self.m_bar = self.line.carry(lambda made: carried(newcomer, made), self.m_bar)
        old, self.line.workers[k] = self.line.workers[k], newcomer
        self.fleet.dismiss(old)
        self._comes(k)
        self.progress.event("anchor renewed", worker=k, reason=reason)

    def _goes(self, k: int) -> None:
        """It gets no job."""
        self.line.away.add(k)
        self.clock.staffed(len(self.line.present))

    def _comes(self, k: int) -> None:
        """It gets jobs again, the first of them with whole weights."""
        self.line.away.discard(k)
        self.clock.staffed(len(self.line.present))
        self._begin_whole(k)

    # --- lockstep -------------------------------------------------------------------------------

    def check(self, worker: int, weights: Callable[[], list[object]]) -> None:
        """The first weights of a worker's stream, before any job; again with a newcomer if it fails."""
        while True:
            try:
                return self.line.check(worker, weights())
            except BaseLost as reason:
                return self.lose(worker, reason)
            except (ActorLost, WaitTimeout) as failure:
                if self.clock.waits:
                    self._renew(worker, failure)
                else:
                    return self.void(worker, failure)

    def done(self, fire: Fire) -> None:
        """Waits for a fire, and for those before it; workers that fail meanwhile are renewed, one that hangs too."""
        for version in [v for v in sorted(self.line.under_way) if v <= fire.due.version]:
            while True:
                earlier, k = self.line.under_way[version], self.line.under_way[version].worker
                try:
                    if k in self._starting:
                        self.fleet.wait_for(f"anchor {k}", *self._starting[k])
                    self.line.report(earlier, self.fleet.alarm(FIRE, f"correction {version}", self.fleet.anchor_limit))
                    break
                except HANDLED as failure:
                    self._renew(k, self._own(earlier, failure))

    def look(self) -> None:
        """Before a tick: deal with whatever has failed since; waits for nothing."""
        if self.clock.waits:
            self._place()
        else:
            self._meet()
        late = [] if self.clock.waits else self.line.overdue(time.monotonic())
        for fire in late:
            what, limit = f"correction {fire.due.version}", self.fleet.anchor_limit
            if fire.due.version in self.line.under_way:
                self.void(fire.worker, WaitTimeout(f"anchor {fire.worker}", what, *limit))
        while failed := self._failed():
            fire, failure = failed
            if self.clock.waits:
                self._renew(fire.worker, self._own(fire, failure))
            elif _echo(fire, failure) and (before := self.line.before(fire.due.version, self.m_bar)) and lost([before]):
                self.line.publish_again(fire.due.version, self._average([fire]))
            elif isinstance(failure, ActorLost | WaitTimeout) and failure.who == SWARM:
                self.unsent(fire.due.version, failure)
            else:
                self.void(fire.worker, self._own(fire, failure))

    def failure(self, fire: Fire) -> Exception | None:
        """Of a fire that is over: how its worker, or the stream of that, failed."""
        found = raised(fire.report, f"anchor {fire.worker}", f"correction {fire.due.version}")
        return found if isinstance(found, HANDLED) else None

    def _failed(self) -> tuple[Fire, Exception] | None:
        """The oldest fire that has failed: those behind it may lack no more than its M̄."""
        found = ((fire, self.failure(fire)) for fire in self.line.arrived())
        return next(((fire, failure) for fire, failure in found if failure), None)

    def _own(self, fire: Fire, failure: Exception) -> Exception:
        """Raises a failure that is somebody else's, of whom the fire's worker gets an argument."""
        if _echo(fire, failure):
            raise failure
        return failure

    def _renew(self, k: int, failure: Exception) -> None:
        """In lockstep: a newcomer with the fires that worker `k` owes."""
        owed = self.line.owed(k)
        frames, whole = self._frames(owed)
        references, nbytes, known = self._had(whole)
        recoverable = known and self._recoverable(owed, frames)
        status = Status("anchor", failure_of(failure), self.progress.tick, recoverable)
        if self.policy.decide(status) is not Decision.RENEW:
            raise failure
        versions = [fire.due.version for fire in owed]
        self.progress.event("anchor renewed", worker=k, reason=described(failure), again=versions)
        old = self.line.workers[k]
        new = self.fleet.renew("anchor", k)
        self.fleet.succeeds(new, old)
        self._starting[k] = self.fleet.arrival(new), time.monotonic()
        if not owed:
            self._begin_whole(k)
            return
        self.progress.ledger.add("snapshot", nbytes, 0)
        self.line.start_again(k, frames, references, self.m_bar)

    def _place(self) -> None:
        """Where newcomers are, once they are there; if one fails, its fires do too, and tell."""
        for k in [k for k, (ready, _) in self._starting.items() if done_of([ready])[0]]:
            ready, _ = self._starting.pop(k)
            if not raised(ready, f"anchor {k}"):
                self.fleet.arrived(self.line.workers[k], take(ready, f"anchor {k}", "its model"))

    def _frames(self, owed: list[Fire]) -> tuple[list[Frame], Callable[[], tuple[list[object], int]] | None]:
        """Of the stream of these fires' worker, from their oldest source on; what asks for the stream's newest, whole."""
        if not owed:
            return [], None
        if self._shared:
            frames = [(s.tick, s.references) for s in self.engines.sent if s.tick >= owed[0].due.source_tick]
            whole = self.engines.whole
        else:
            frames = [(fire.due.source_tick, fire.job.snapshot) for fire in owed if fire.job]
            newest, stream = owed[-1].due.source_tick, stream_of(owed[-1].worker)
            whole = lambda: self.fleet.weights(newest, stream, whole=True)[:2]  # noqa: E731
        return frames, None if self.config.snapshot.encoding == "full" else whole

    @staticmethod
    def _had(whole: Callable[[], tuple[list[object], int]] | None) -> tuple[list[object], int, bool]:
        """References and their bytes, and whether they can be had: a rank that is new does not know a stream's past."""
        try:
            references, nbytes = whole() if whole else ([], 0)
        except BaseLost:
            return [], 0, False
        return references, nbytes, True

    def _recoverable(self, owed: list[Fire], frames: list[Frame]) -> bool:
        """Whether all that the fires need is still there, and their weights can be had to the bit."""
        if not owed:
            return True
        needs = [reference for _, references in frames for reference in references]
        needs += [reference for fire in owed if fire.job for reference in fire.job.replay]
        before = self.line.before(owed[0].due.version, self.m_bar)
        source, own = owed[0].due.source_tick, self.begun.get(stream_of(owed[0].worker), 0)
        reached = bool(frames) and frames[0][0] == source
        back = self.engines.leads_back(source) if self._shared else own <= source
        return reached and back and not lost([*needs, *([] if before is None else [before])])

    # --- on the wall clock ----------------------------------------------------------------------

    def void(self, k: int, failure: Exception) -> None:
        """What worker `k` owes is void. It gets whole weights, or a newcomer its place; or the swarm goes on without it."""
        decision = self.policy.decide(Status("anchor", failure_of(failure), self.progress.tick, waits=False))
        if decision not in (Decision.RENEW, Decision.WITHOUT):
            raise failure
        owed = self.line.owed(k)
        self._drop(owed)
        versions = [fire.due.version for fire in owed]
        if isinstance(failure, BaseLost) and decision is Decision.RENEW:
            self.lose(k, failure)
            return
        self._goes(k)
        name = "anchor lost" if decision is Decision.RENEW else "anchor given up"
        self.progress.event(name, worker=k, reason=described(failure), void=versions)
        if decision is Decision.RENEW:
            self._starting[k] = self.fleet.arrival(self.fleet.renew("anchor", k)), time.monotonic()

    def unsent(self, version: int, failure: Exception) -> None:
        """The weights that a fire was to start from were lost, with a rank or with its node."""
        fire = self.line.under_way.get(version)
        if fire is not None:
            self._drop([fire])
            self.lose(fire.worker, failure)

    def refuse(self, fire: Fire, reason: str) -> None:
        """Of a worker that is well: no rank gets it, and M̄ goes on without it."""
        self._drop([fire])
        self.progress.event("correction refused", version=fire.due.version, reason=reason)

    def _drop(self, fires: list[Fire]) -> None:
        for fire in fires:
            self.choice.give_back(fire.due.version)
            self.clock.finished(fire.due.version, void=True)
        self.line.drop(fires, self._average(fires))

    def _average(self, owed: list[Fire]) -> object:
        """M̄ before these fires, or before the next one; nothing if it was lost with its node."""
        first = owed[0].due.version if owed else 1 + max(self.line.under_way, default=0)
        before = self.line.before(first, self.m_bar)
        if before is None or not lost([before]):
            return before
        self.progress.event("anchor average begins anew", reason="it was lost with its node")
        return None

    def _meet(self) -> None:
        """Newcomers that are ready get jobs from now on; one that does not come in time has failed."""
        swarm, now = self.config.swarm, time.monotonic()
        for k, (ready, since) in list(self._starting.items()):
            over, failure = bool(done_of([ready])[0]), None
            if over:
                failure = raised(ready, f"anchor {k}", "its model")
            elif now > since + swarm.start_timeout_s:
                failure = WaitTimeout(f"anchor {k}", "its model", swarm.start_timeout_s, "swarm.start_timeout_s")
            if not over and failure is None:
                continue
            del self._starting[k]
            if failure:
                self.void(k, failure)
                continue
            self.fleet.arrived(self.line.workers[k], take(ready, f"anchor {k}", "its model"))
            self._comes(k)
            self.progress.event("anchor renewed", worker=k)


Frame = tuple[int, list[object]]  # ticks, and a reference for each stage


def _echo(fire: Fire, failure: Exception) -> bool:
    return isinstance(failure, ActorLost | WaitTimeout) and failure.who != f"anchor {fire.worker}"


def stream_of(worker: int) -> str:
    """The stream of weights of one anchor worker."""
    return f"anchor {worker}"
