"""The engines of a run: weights go to all in one stream, prompts in turn, and one that fails is renewed alone.

    engine 0   load W0 │ gen a0 │ load W1 │ gen b0 │ load W2
    engine 1   load W0 │ ✗          a newcomer:  whole W2, taken back to W0 │ gen a1 │ load W1 │ gen b1 │ load W2

A newcomer gets what the stream's receivers hold, whole, and the queue of the one before it, from the oldest samples on
that are still to come. What is asked of the newest weights goes to others at once: samples depend on seed, step and
prompt, not on who makes them. Neither coded steps can be taken back nor what is whole, which is sent by a rank that is new:
then samples of older weights are asked of the newest, or, where a lockstep run has no coded steps, the run rewinds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from anchor_service.calls import ActorHandle, Calls, done_of, raised
from anchor_service.errors import ActorLost, WaitTimeout, described
from anchor_service.line import FireLine
from rl.batch import Prompts
from rl.engine import EngineFailed
from rl.model_files import trained_count
from rl.problems import Problems
from rl.rollout import RolloutWorker
from rl.snapshot import BaseLost
from swarm.failure_policy import Decision, Failure, FailurePolicy, Status, failure_of
from swarm.fleet import Fleet
from swarm.lookahead import Asked, Result, Sent
from swarm.messages import ENGINES_STREAM
from swarm.progress import Progress
from swarm.run_config import RunConfig

T = TypeVar("T")
Owed = tuple[Asked, list[int]]  # which of its calls
HANDLED = (BaseLost, EngineFailed, ActorLost, WaitTimeout)


class _Failed(Exception):
    """Engines that failed, by number, each with its own error; `cause` is the one that was met first."""

    def __init__(self, cause: Exception, engines: dict[int, Exception]):
        super().__init__(cause, engines)
        self.cause, self.engines = cause, engines


class EngineLine:
    """All engines of a run. `line`: anchor workers that follow the same stream of weights."""

    def __init__(self, config: RunConfig, fleet: Fleet, progress: Progress, line: FireLine, policy: FailurePolicy):
        self.config, self.fleet, self.progress, self.line, self.policy = config, fleet, progress, line, policy
        self.sent: list[Sent] = []  # from the oldest that something under way may need to the newest
        self._unsettled: list[Sent] = []  # weights of which engines have not said yet what they hold; oldest first
        self._under_way: list[Asked] = []
        self._starting: dict[
            str, tuple[object, float]
        ] = {}  # newcomers: when they are ready, and since when they start
        self._parameters = trained_count(config.model)

    # --- what they are asked for ----------------------------------------------------------------

    def problems(self) -> list[Problems]:
        """Of each engine."""

        def ask() -> list[Problems]:
            calls: Calls = [(_name(i), engine.problems.remote()) for i, engine in enumerate(self.fleet.engines)]
            return self._gather(calls, "its problems")

        return self._mended(ask)

    def ask(self, step: int, prompts: list[Prompts]) -> Asked:
        """Samples of the weights that were sent last; waits for nothing."""
        calls = [self._generate(i % len(self.fleet.engines), ask) for i, ask in enumerate(prompts)]
        asked = Asked(step, self.sent[-1], calls, prompts)
        self._under_way.append(asked)
        return asked

    def deliver(self, asked: Asked, what: str) -> list[Result]:
        """Waits for it, and for the digests of the weights that sampled it."""

        def wait() -> list[Result]:
            self._agree(asked.weights)
            return self._gather(asked.calls, what, f"generate {asked.prompts[0].split}", asked.since)

        if asked.results is None:
            asked.results = self._mended(wait)
            self._under_way = [other for other in self._under_way if other is not asked]
        return asked.results

    def sleep(self) -> None:
        """Leave the GPUs that engines share with workers to those."""
        if self.config.rollout.placement == "colocated":
            engines = self.fleet.engines
            self._mended(lambda: self._gather([(_name(i), e.sleep.remote()) for i, e in enumerate(engines)], "sleep"))

    def _generate(self, k: int, ask: Prompts) -> tuple[str, object]:
        return _name(k), self.fleet.engines[k].generate.remote(ask)

    # --- weights --------------------------------------------------------------------------------

    def send(self, wait: bool) -> Sent:
        """The weights of this moment, into the queue of every engine, and of an anchor that shares their stream.

        With `wait` until all hold them; else for nothing.
        """
        self._mended(self._meet)
        config, tick, fleet, ledger = self.config, self.progress.tick, self.fleet, self.progress.ledger
        step = tick // config.grpo.ticks_per_step
        exact = config.exact_after(step)
        references, nbytes, whole = fleet.weights(tick, ENGINES_STREAM, whole=False, exact=exact)
        calls: Calls = [(_name(i), e.load_weights.remote(tick, *references)) for i, e in enumerate(fleet.engines)]
        self.line.follow(tick, references)
        nodes = fleet.nodes(fleet.engines)
        if apart := fleet.nodes(self.line.present) - nodes:  # the engines' copies are elsewhere
            ledger.add("snapshot", nbytes * len(apart), 0)
        dense = self._parameters * config.model.itemsize  # what a dense system sends
        ledger.add("rollout_sync", nbytes * len(nodes), dense * len(nodes))
        kind = "load exact" if exact else "load coded"
        newest = Sent(step, tick, calls, references=references, whole=whole, kind=kind)
        self._unsettled.append(newest)
        wanted = [a.weights.tick for a in self._under_way] + [f.due.source_tick for f in self.line.under_way.values()]
        self.sent = [s for s in self.sent if s.tick >= min(wanted, default=tick)] + [newest]
        self._mended(lambda: self._settle(wait))
        return newest

    def whole(self) -> tuple[list[object], int]:
        """References to what the stream's receivers hold now, whole, for one that has lost it; bytes that this sends."""
        newest = self.sent[-1]
        if self.config.snapshot.encoding == "full":
            return newest.references, 0
        return self.fleet.weights(newest.tick, ENGINES_STREAM, whole=True)[:2]

    def leads_back(self, tick: int) -> bool:
        """Whether the newest weights can be taken back to those after `tick` ticks: over exact deltas alone."""
        later = [sent for sent in self.sent if sent.tick > tick]
        return not later or (self.config.snapshot.rate is None and not any(sent.whole for sent in later))

    def _meet(self) -> None:
        """Waits for newcomers. After that it is known where each is."""
        for name in list(self._starting):
            self._wait_for(name)

    def _wait_for(self, name: str) -> None:
        engine = self.fleet.engines[_number(name)]
        try:
            place = self.fleet.wait_for(name, *self._starting[name])
        except HANDLED as failure:
            raise _Failed(failure, {_number(name): failure}) from failure
        self.fleet.arrived(engine, place)
        del self._starting[name]

    def _agree(self, sent: Sent) -> None:
        """Waits until every engine holds these weights, the same to the bit."""
        if sent.digest or not sent.calls:
            return
        digests = self._gather(sent.calls, f"loading the weights of tick {sent.tick}", sent.kind, sent.since)
        (usual, count), *others = Counter(digests).most_common()
        if others:
            cause = EngineFailed(f"the weights of tick {sent.tick}", f"engines hold {digests}", "start the run anew")
            right = usual if 2 * count > len(digests) else None
            raise _Failed(cause, {_number(n): cause for (n, _), d in zip(sent.calls, digests) if d != right})
        sent.digest = usual

    def _settle(self, wait: bool) -> None:
        """`_agree` on all weights that were sent, or on those that have arrived: a failure is found early."""
        while self._unsettled and (wait or all(_over(reference) for _, reference in self._unsettled[0].calls)):
            self._agree(self._unsettled[0])
            del self._unsettled[0]

    # --- failures -------------------------------------------------------------------------------

    def _mended(self, work: Callable[[], T]) -> T:
        """What `work` returns once no engine fails in it; it is called again after each failure that is dealt with."""
        while True:
            try:
                return work()
            except _Failed as failed:
                cause, recoverable = failed.cause, not any(self._bound(k, e) for k, e in failed.engines.items())
                decision = self.policy.decide(Status("engine", failure_of(cause), self.progress.tick, recoverable))
                if decision is Decision.REWIND and not isinstance(cause, ActorLost | WaitTimeout):
                    who = ", ".join(map(_name, failed.engines))  # of a bad answer alone nobody would be blamed
                    raise ActorLost(who, "samples of weights that are not to be had again", described(cause)) from cause
                if decision is not Decision.RENEW:
                    raise cause from None
                self._mend(failed.engines)

    def _gather(self, calls: Calls, what: str, kind: str = "", since: float | None = None) -> list[Any]:
        """`kind`, else `what`, takes as long as this; `since`: from when on."""
        for name in [name for name in dict(calls) if name in self._starting]:
            self._wait_for(name)
        try:
            return self.fleet.gather(calls, what, self.fleet.engine_limit, kind or what, since)
        except HANDLED as failure:
            engines = _failed(failure, calls)
            if not engines:  # a rank whose weights they wait for
                raise
            raise _Failed(failure, engines) from failure

    def _mend(self, failed: dict[int, Exception]) -> None:
        """A new one in the place of each; one that has lost its base and nothing else gets whole weights."""
        lacking = {k: self._owed(k, failure_of(error) is Failure.BAD) for k, error in failed.items()}
        for k, error in failed.items():
            if isinstance(error, BaseLost) and not lacking[k]:
                self.progress.event("weights resynchronised", engine=k, reason=str(error))
                continue
            steps = {"asked_again": [a.step for a, _ in lacking[k]]} if lacking[k] else {}
            self.progress.event("engine renewed", engine=k, reason=described(error), **steps)
            self._starting[_name(k)] = self.fleet.arrival(self.fleet.renew("engine", k)), time.monotonic()
        if self.sent:
            for k in failed:
                self._catch_up(k, lacking[k])

    def replace(self, k: int, newcomer: ActorHandle[RolloutWorker], reason: str) -> None:
        """One that is ready in the place of engine `k`, which is well: what no other can sample, it does first."""
        for asked in self._bound(k):
            self.deliver(asked, f"samples of step {asked.step}")
        owed = self._owed(k, distrusted=False)
        old, self.fleet.engines[k] = self.fleet.engines[k], newcomer
        self.fleet.dismiss(old)
        self.progress.event("engine renewed", engine=k, reason=reason, asked_again=[a.step for a, _ in owed])
        if self.sent:
            self._catch_up(k, owed)

    def _owed(self, k: int, distrusted: bool) -> list[Owed]:
        """What engine `k` has not delivered; all that it was asked for if it gave a bad answer, or had bad weights."""
        found: list[Owed] = []
        for asked in self._under_way:
            sure = not distrusted and all(_good(r) for n, r in asked.weights.calls if n == _name(k))
            mine = [i for i, (n, r) in enumerate(asked.calls) if n == _name(k) and not (sure and _good(r))]
            found += [(asked, mine)] if mine else []
        return found

    def _bound(self, k: int, error: Exception | None = None) -> list[Asked]:
        """What engine `k` owes of weights that no other can have, where they must be those: in lockstep, of exact frames."""
        if self.config.anchor.clock != "lockstep" or self.config.snapshot.rate is not None:
            return []
        distrusted = error is not None and failure_of(error) is Failure.BAD
        return [asked for asked, _ in self._owed(k, distrusted) if not self.leads_back(asked.weights.tick)]

    def _catch_up(self, k: int, owed: list[Owed]) -> None:
        """The queue of engine `k` again, from the oldest weights on of which samples are still to come."""
        newest = self.sent[-1]
        for asked, mine in owed:
            if not self.leads_back(asked.weights.tick):  # all of it: a step has one set of weights
                asked.weights, mine[:] = newest, range(len(asked.calls))
        oldest = min([a.weights.tick for a, _ in owed], default=newest.tick)
        for sent in self._unsettled:
            sent.calls = [(n, r) for n, r in sent.calls if n != _name(k) or _good(r)]
        for sent in (s for s in self.sent if s.tick >= oldest):
            call = self._load(k, sent, first=sent.tick == oldest)
            sent.calls, sent.digest = [(n, r) for n, r in sent.calls if n != _name(k)] + [(_name(k), call)], ""
            for asked, mine in owed:
                if asked.weights is sent:
                    self._ask_again(asked, mine, k)

    def _load(self, k: int, sent: Sent, first: bool) -> object:
        """Weights for engine `k`: the first it gets are whole, and taken back to those of `sent`."""
        engine = self.fleet.engines[k]
        if not first or self.config.snapshot.encoding == "full":
            return engine.load_weights.remote(sent.tick, *sent.references)
        references, nbytes = self.whole()
        self.progress.ledger.add("rollout_sync", nbytes, 0)
        later = [reference for s in reversed(self.sent) if s.tick > sent.tick for reference in s.references]
        return engine.catch_up.remote(self.sent[-1].tick, len(references), *references, *later)

    def _ask_again(self, asked: Asked, mine: list[int], k: int) -> None:
        """Of engine `k` itself, or where all hold the same weights of others that are there."""
        others = [i for i in range(len(self.fleet.engines)) if i != k and _name(i) not in self._starting]
        takers = others if others and asked.weights is self.sent[-1] else [k]
        for turn, i in enumerate(mine):
            asked.calls[i] = self._generate(takers[turn % len(takers)], asked.prompts[i])


def _name(k: int) -> str:
    return f"engine {k}"


def _number(name: str) -> int:
    return int(name.removeprefix("engine "))


def _over(reference: object) -> bool:
    return bool(done_of([reference])[0])


def _good(reference: object) -> bool:
    return _over(reference) and raised(reference, "an engine") is None


def _failed(failure: Exception, calls: Calls) -> dict[int, Exception]:
    """Which engines, by the calls of them that were waited for: those that raised, or at a deadline are not over."""
    if isinstance(failure, WaitTimeout):
        return {_number(name): failure for name, reference in calls if not _over(reference)}
    found = {name: error for name, ref in calls if _over(ref) and (error := raised(ref, name))}
    own = {name: e for name, e in found.items() if not isinstance(e, ActorLost) or e.who == name}
    return {_number(name): error for name, error in own.items() if isinstance(error, HANDLED)}
