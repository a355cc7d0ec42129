"""Anchor workers that die, hang or lose their base, by real `Corrections` on workers that do a call when it is waited for.

Values are words: M(θ3, b4) is the gradient of the weights after 3 ticks on the mini-batch of tick 4, and M̄ a list of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anchor_service import line as anchor_line
from anchor_service.clock import make_clock
from anchor_service.errors import SWARM, ActorLost, WaitTimeout
from anchor_service.line import FireLine
from anchor_service.messages import NORM
from deploy.config import load
from rl.snapshot import BaseLost
from swarm import anchor_faults, corrections, snapshots
from swarm.blame import blamed
from swarm.config import FaultsConfig
from swarm.corrections import Corrections
from swarm.engine_line import EngineLine
from swarm.failure_policy import FailurePolicy
from swarm.messages import MergeOutcome
from swarm.progress import Progress
from swarm.replay_choice import MiniFrame

TICKS, A_STEP = 24, 2
Word = tuple[str, ...]


@dataclass(frozen=True)
class Ref:
    """Return value number `part` of call number `call`."""

    worker: Lazy
    call: int
    part: int = 0

    @property
    def over(self) -> bool:
        return self.call in self.worker.done

    def value(self) -> Any:
        found = self.worker.until(self.call)
        part = found[self.part] if isinstance(found, list) else found
        if isinstance(part, Exception):
            raise part
        return part


def value(ref: Ref, who: str) -> Any:
    try:
        return ref.value()
    except (ActorLost, WaitTimeout) as error:
        _, *rest = error.args
        raise type(error)(error.who.replace("itself", who).replace("it gets", f"{who} gets"), *rest) from error


class Lazy:
    """An anchor worker. From call number `fails` on it is dead, or hangs; or there it forgets what it holds."""

    def __init__(self, fails: int = -1, failure: str = ""):
        self.held, self.fails, self.failure, self.killed = 0, fails, failure, False
        self.queue: list[tuple[str, tuple[Any, ...]]] = []
        self.done: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in ("follow", "catch_up", "gradient", "publish", "ready", "copy"):
            raise AttributeError(name)

        def remote(*args: Any, returns: int = 0) -> Any:
            self.queue.append((name, args))
            number = len(self.queue) - 1
            return [Ref(self, number, part) for part in range(returns)] if returns else Ref(self, number)

        options = lambda num_returns: SimpleNamespace(remote=lambda *args: remote(*args, returns=num_returns))  # noqa: E731
        return SimpleNamespace(remote=remote, options=options)

    def until(self, number: int) -> Any:
        for i in range(len(self.done), number + 1):
            gone = i >= self.fails >= 0
            if not self.killed and gone and self.failure == "hung":
                raise WaitTimeout("itself", "its call", 1.0, "a knob")
            if i == self.fails and self.failure == "base":
                self.held = 999
            dead = self.killed or (gone and self.failure == "lost")
            self.done[i] = ActorLost("itself", "its call", "killed") if dead else self._do(*self.queue[i])
        if isinstance(self.done[number], Exception):
            raise self.done[number]
        return self.done[number]

    def _do(self, name: str, args: tuple[Any, ...]) -> Any:
        try:
            return getattr(self, f"_{name}")(*[a.value() if isinstance(a, Ref) else a for a in args])
        except ActorLost as error:  # what the call before it raised of the swarm is what this one fails with
            passed_on = error.who == SWARM
            return error if passed_on else ActorLost("an actor that it gets an argument from", "its call", "killed")
        except BaseLost as lost:
            return lost

    def _ready(self) -> str:
        return "the node"

    def _copy(self, value: Any) -> Any:
        return value

    def _follow(self, tick: int, frame: tuple[bool, int, int] | ActorLost) -> None:
        if isinstance(frame, ActorLost):
            raise frame
        whole, base, after = frame
        if after != tick or not (whole or base == self.held):
            raise BaseLost(0, base, self.held)
        self.held = tick

    def _catch_up(self, tick: int, *frames: tuple[bool, int, int]) -> None:
        self._follow(tick, frames[0])
        for whole, base, after in frames[1:]:
            assert self.held == after
            if whole:  # nothing leads back over it: a FrameError that nobody waits for
                return
            self.held = base

    def _gradient(self, job: Any) -> list[Any]:
        if job.snapshot and isinstance(job.snapshot[0], ActorLost):
            raise ActorLost(SWARM, "the snapshot", job.snapshot[0].reason)
        if job.snapshot:
            self._follow(job.source_tick, job.snapshot[0])
        if self.held != job.source_tick:
            raise BaseLost(0, job.source_tick, self.held)
        return [
            {"version": job.version, "source_tick": job.source_tick, NORM: 1.0},
            f"M(θ{self.held}, {job.replay[0]})",
        ]

    def _publish(self, report: dict[str, Any], m: str, m_bar: Word | None) -> list[Any]:
        new = (*(m_bar or ()), m)
        return [report | {"perf/max_memory_gb": 0.0, "stage_bytes": [[1]]}, new, (report["version"], new)]


class Run:
    """The coordinator's order of events around `Corrections`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: list[Lazy], swift: bool, *sets: str):
        self.config = config = load("k5", [f"anchor.workers={len(workers)}", *sets], given=())
        self.workers, self.later, self.tick_of, self.now = workers, Lazy, dict[str, int](), 0.0
        self.events: list[tuple[str, dict[str, Any]]] = []
        event = lambda step, tick, name, **more: self.events.append((name, more))  # noqa: E731
        self.progress = Progress(SimpleNamespace(event=event, fire=lambda *_: None))
        self.policy = FailurePolicy(FaultsConfig(a_tick=4))
        newest = lambda: self._weights(self.shared.sent[-1].tick, "engines", True)[:2]  # noqa: E731
        back = lambda tick: EngineLine.leads_back(self.shared, tick)  # noqa: E731
        self.shared = SimpleNamespace(config=config, sent=[], whole=newest, leads_back=back)
        self.ranks = [
            SimpleNamespace(deliver=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._deliver)))
        ]
        self.delivered: list[tuple[int, Word]] = []
        fleet = SimpleNamespace(
            anchors=workers,
            workers=self.ranks,
            weights=self._weights,
            weights_beside=self._weights_beside,
            renew=self._renew,
            arrival=lambda worker: worker.ready.remote(),
            arrived=lambda worker, place: None,
            succeeds=lambda newcomer, old: None,
            dismiss=lambda worker: setattr(worker, "killed", True),
            nodes=lambda actors: {"the node"},
            replicas_of=lambda p: [],
            anchor_limit=(1.0, "anchor.timeout_s"),
            swarm_limit=(1.0, "swarm.timeout_s"),
            lookout=None,
            alarm=lambda *_: None,
            wait_for=lambda name, ready, since: value(ready, name),
        )
        self._patch(monkeypatch, swift)
        self.clock = make_clock(config.anchor, 0, TICKS, A_STEP)
        self.line = FireLine(workers, 1, 1, config.anchor.timeout_s, self.clock.bound())
        store: Callable[[Any], Any] = lambda value: value  # noqa: E731
        self.corrections = Corrections(
            config, fleet, self.progress, self.line, self.clock, store, self.shared, self.policy
        )
        self.merged: list[Word] = []

    def _patch(self, monkeypatch: pytest.MonkeyPatch, swift: bool) -> None:
        def raised(ref: Ref, who: str, what: str = "") -> Exception | None:
            try:
                value(ref, who)
            except Exception as error:
                return error
            return None

        def done_of(refs: list[Ref]) -> tuple[list[Ref], list[Ref]]:
            for ref in refs if swift else []:
                raised(ref, "")
            return [ref for ref in refs if ref.over], [ref for ref in refs if not ref.over]

        gather = lambda calls, *_, **__: [value(ref, who) for who, ref in calls]  # noqa: E731
        for module in (anchor_line, anchor_faults):
            monkeypatch.setattr(module, "done_of", done_of)
            monkeypatch.setattr(module, "raised", raised)
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(anchor_line, "gather", gather)
        monkeypatch.setattr(snapshots, "gather", lambda calls, *_: [ref() for _, ref in calls])
        monkeypatch.setattr(anchor_faults, "carried", lambda worker, made: worker.copy.remote(made))
        monkeypatch.setattr(anchor_faults, "take", lambda ref, *_: ref.value())
        monkeypatch.setattr(anchor_faults, "lost", lambda references: bool(self.gone & set(map(str, references))))
        self.gone, self.forgotten, self.rank_dies, self.node_dies = set[str](), False, -1, -1
        self.reborn: set[int] = set()  # ticks after which a rank is new: what it sends then is whole

    def _renew(self, role: str, k: int) -> Lazy:
        assert role == "anchor"
        self.workers[k].killed = True
        self.workers[k] = new = self.later()
        return new

    def _weights(self, tick: int, stream: str, whole: bool) -> tuple[list[object], int, bool]:
        full = self.config.snapshot.encoding == "full"
        if self.forgotten and tick < self.progress.tick:
            raise BaseLost(0, tick, None)
        assert not full or tick == self.progress.tick  # it would be of other weights than those that were asked for
        base, self.tick_of[stream] = self.tick_of.get(stream, 0), tick
        if tick == self.node_dies:  # after the frame was made, and before an anchor has pulled it
            return [ActorLost("itself", "its call", "its node died")], 10, False
        new = not full and tick in self.reborn
        return [(whole or new or full, base, tick)], 10, not full and (whole or new)

    def _weights_beside(self, tick: int, stream: str, whole: bool) -> tuple[list[object], list[tuple[str, Any]]]:
        references, *said = self._weights(tick, stream, whole)
        if tick != self.rank_dies:
            return references, [("worker d0p0", lambda: said)]
        self.tick_of[stream] = self.tick_of[stream] - 1  # whatever it is: the next frame is whole
        lost = ActorLost("worker d0p0", "its call", "killed")

        def size() -> int:
            raise lost

        return [lost], [("worker d0p0", size)]

    def _deliver(self, version: int, reference: list[Ref], whole: bool) -> Ref:
        self.delivered.append(reference[0].value())
        return reference[0]

    def begin(self) -> Run:
        self._step_ends()
        self.corrections.begin()
        return self

    def tick(self) -> None:
        tick, samples = self.progress.tick + 1, self.config.grpo.ppo_mini_batch_size * self.config.grpo.group_size
        self.corrections.deliver()
        self.corrections.offer(MiniFrame([0] * samples, f"b{tick}", 1))
        self.progress.tick, self.now = tick, self.now + 1.0
        references, _ = self.corrections.due(tick)
        found = references[0][0].value() if references else self.delivered[-1] if self.delivered else None
        if found and (not self.merged or found[1] != self.merged[-1]):
            self.merged.append(found[1])
        self.corrections.log(MergeOutcome(version=found and found[0]), 1.0)
        self._step_ends()

    def leave(self, worker: int) -> bool:
        """Whether it has left; what lay on its node is gone then: all but reports, which the driver has."""
        if not self.corrections.faults.may_leave(worker):
            return False
        old, new = self.workers[worker], Lazy()
        self.corrections.faults.replace(worker, new, "its node is draining")
        for number in range(len(new.queue)):
            new.until(number)
        gone = ActorLost("itself", "its call", "its node is gone")
        old.done = {i: [made[0], gone, gone] if isinstance(made, list) else made for i, made in old.done.items()}
        return True

    def _step_ends(self) -> None:
        tick = self.progress.tick
        if tick % A_STEP == 0 and self.config.anchor.weights == "shared":
            references, _, whole = self._weights(tick, "engines", False)
            self.shared.sent.append(SimpleNamespace(tick=tick, references=references, whole=whole))
            self.line.follow(tick, references)

    def to_the_end(self) -> Run:
        self.begin()
        while self.progress.tick < TICKS:
            self.tick()
        return self

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def lawful(run: Run) -> list[Word]:
    """From the agenda: M̄ of each fire that is due holds M of its own source and of all before it."""
    dues = [due for source in range(TICKS) for due in run.clock.to_start(source)]
    words = tuple(f"M(θ{due.source_tick}, b{due.source_tick + 1})" for due in dues)
    return [words[: i + 1] for i, due in enumerate(dues) if due.first_tick <= TICKS]


# --- lockstep ----------------------------------------------------------------------------------

LAGS = [("anchor.delay_k=5", "anchor.cadence=2"), ("anchor.delay_k=2", "anchor.cadence=2"), ("anchor.delay_k=6",)]


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize("failure", ["lost", "hung"])
@pytest.mark.parametrize("encoding", ["delta", "full"])
def test_in_lockstep_every_correction_is_that_of_a_run_without_failures(
    monkeypatch: pytest.MonkeyPatch, failure: str, encoding: str, swift: bool
):
    """Whatever call of the first worker is its last, with one to three of them, and one to three fires under way."""
    for lag, workers, fails in itertools.product(LAGS, (1, 2, 3), (0, 1, 2, 3, 4, 7, 10)):
        held = [first := Lazy(fails, failure), *(Lazy() for _ in range(workers - 1))]
        run = Run(monkeypatch, held, swift, *lag, f"snapshot.encoding={encoding}").to_the_end()
        assert run.merged == lawful(run)
        assert run.names == ["anchor renewed"] * (len(first.queue) > fails)
        assert not run.line.away


@pytest.mark.parametrize("swift", [False, True])
def test_newcomers_that_fail_too_are_renewed_and_two_at_once(monkeypatch: pytest.MonkeyPatch, swift: bool):
    for fails in itertools.product((1, 4, 6), repeat=3):
        run = Run(monkeypatch, [Lazy(fails[0], "lost"), Lazy(fails[1], "hung")], swift, *LAGS[0])
        later = iter([Lazy(fails[2], "lost"), Lazy(2, "hung")])
        run.later = lambda: next(later, Lazy())  # noqa: B023
        run.to_the_end()
        assert run.merged == lawful(run)


def test_in_lockstep_a_rank_that_is_new_itself_does_not_know_earlier_weights_and_the_run_rewinds(
    monkeypatch: pytest.MonkeyPatch,
):
    run = Run(monkeypatch, [Lazy(8, "lost")], False, *LAGS[0])
    run.forgotten = True
    with pytest.raises(ActorLost, match="anchor 0"):
        run.to_the_end()
    assert run.names == []


SHARED = "anchor.delay_k=8", "anchor.cadence=2", "anchor.weights=shared"


@pytest.mark.parametrize("sets", [LAGS[0], SHARED])
def test_in_lockstep_nothing_leads_back_over_a_whole_frame_and_the_run_rewinds(
    monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...]
):
    """Whatever call of the worker is its last, where the weights after 7 or 8 ticks come whole."""
    seen: list[int] = []
    for fails in range(1, 30):
        run = Run(monkeypatch, [Lazy(fails, "lost")], False, *sets)
        run.reborn = {7, 8}
        try:
            run.to_the_end()
        except ActorLost as failure:
            first = run.line.owed(0)[0].due.source_tick
            assert failure.who == "anchor 0" and first < 8 and run.names == []
            seen.append(fails)
        else:
            assert run.merged == lawful(run)
    assert 0 < len(seen) < 10


@pytest.mark.parametrize("fails", [1, 3, 5, 8])
def test_in_a_shared_stream_the_newcomer_gets_the_weights_of_its_fires_too(monkeypatch: pytest.MonkeyPatch, fails: int):
    aligned = "anchor.delay_k=8", "anchor.cadence=2", "anchor.weights=shared"
    run = Run(monkeypatch, [Lazy(fails, "lost")], False, *aligned).to_the_end()
    assert run.merged == lawful(run) and run.names == ["anchor renewed"]
    coded = Run(monkeypatch, [Lazy(fails, "lost")], False, *aligned, "snapshot.rate=0.05")
    with pytest.raises(ActorLost):  # for whoever can rewind the run: coded steps cannot be taken back
        coded.to_the_end()


def test_in_lockstep_an_average_that_went_with_its_node_rewinds_the_run(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, [Lazy(8, "lost")], False, *LAGS[0]).begin()
    with pytest.raises(ActorLost):
        while True:
            run.tick()
            run.gone = {str(run.corrections.faults.m_bar)}
    assert run.names == []


@pytest.mark.parametrize("swift", [False, True])
def test_in_lockstep_weights_that_went_with_their_node_before_an_anchor_had_them_rewind_the_run(
    monkeypatch: pytest.MonkeyPatch, swift: bool
):
    run = Run(monkeypatch, [Lazy(), Lazy()], swift, *LAGS[0]).begin()
    run.node_dies = next(source for source in range(4, TICKS) if run.clock.to_start(source))
    with pytest.raises(ActorLost, match="the swarm ended") as caught:
        while run.progress.tick < TICKS:
            run.tick()
    # not a worker's alone: the tick would be taken again with the fire that has failed
    assert [blame.role for blame in blamed(caught.value, 1)] == ["worker", "anchor"] and run.names == []


def test_a_failing_anchor_ends_the_run_with_its_last_error_when_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, [Lazy(1, "lost")], False, *LAGS[0])
    run.later = lambda: Lazy(0, "lost")
    with pytest.raises(ActorLost, match="anchor 0"):
        run.to_the_end()
    assert run.names == ["anchor renewed"] * 4


@pytest.mark.parametrize("encoding", ["delta", "full"])
def test_in_lockstep_an_anchor_that_leaves_in_order_takes_nothing_with_it(
    monkeypatch: pytest.MonkeyPatch, encoding: str
):
    """Neither its average, nor a correction that nobody has merged yet."""
    for lag, first in itertools.product(LAGS, range(0, 12, 3)):
        run, left = Run(monkeypatch, [Lazy()], True, *lag, f"snapshot.encoding={encoding}").begin(), False
        while run.progress.tick < TICKS:
            run.tick()
            left = left or (run.progress.tick > first and run.leave(0))
        assert run.merged == lawful(run) and run.names == ["anchor renewed"]


# --- wall --------------------------------------------------------------------------------------

WALL = "anchor.clock=wall", "anchor.timeout_s=3"


def batches(words: list[Word]) -> list[str]:
    return [word[-1] for word in words]


@pytest.mark.parametrize("failure", ["lost", "hung", "base"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_on_the_wall_clock_the_fire_is_void_and_the_newcomer_serves_later(
    monkeypatch: pytest.MonkeyPatch, failure: str, workers: int, shared: bool
):
    for fails in range(1, 9):
        held = [Lazy(fails, failure), *(Lazy() for _ in range(workers - 1))]
        weights = "anchor.weights=shared" if shared else "anchor.weights=swarm"
        run = Run(monkeypatch, held, True, *WALL, weights).to_the_end()
        if run.names:
            assert run.names in (["anchor lost", "anchor renewed"], ["snapshot lost"])
            assert [name for name, _ in run.workers[0].queue].count("gradient") >= 2
        assert run.line.away == set() and run.clock.workers == workers
        for word in run.merged:
            ticks = [int(m.split(",")[0].removeprefix("M(θ")) for m in word]
            assert ticks == sorted(set(ticks)) and all(m == f"M(θ{t}, b{t + 1})" for m, t in zip(word, ticks))
        assert run.merged[-1][: len(run.merged[0])] == run.merged[0]  # M̄ lives on


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("swift", [False, True])
def test_a_snapshot_that_is_lost_with_its_rank_voids_its_fire_and_no_anchor_is_blamed(
    monkeypatch: pytest.MonkeyPatch, workers: int, swift: bool
):
    held = [Lazy() for _ in range(workers)]
    run = Run(monkeypatch, [*held], swift, *WALL).begin()
    while not run.names:
        run.rank_dies = run.progress.tick
        run.tick()
    run.rank_dies = -1
    while run.progress.tick < TICKS:
        run.tick()
        for fire in run.line.under_way.values():
            fire.report.value()
    assert run.names == ["snapshot lost"] and run.workers == held
    assert run.merged and not any(m.startswith("M(θ0,") for m in run.merged[-1])
    begun, jobs = workers, sum(name == "gradient" for worker in held for name, _ in worker.queue)
    assert run.progress.ledger.state()["snapshot"][0] == 10 * (begun + jobs - 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_so_does_one_that_goes_with_its_node_before_an_anchor_has_it(monkeypatch: pytest.MonkeyPatch, workers: int):
    held = [Lazy() for _ in range(workers)]
    run = Run(monkeypatch, [*held], True, *WALL).begin()
    run.node_dies = 4
    while run.progress.tick < TICKS:
        run.tick()
    assert run.names == ["snapshot lost"] and run.workers == held
    ticks = [int(m.split(",")[0].removeprefix("M(θ")) for m in run.merged[-1]]
    assert ticks[0] < 4 < ticks[-1] and 4 not in ticks  # M̄ lives on


def test_nothing_starts_while_no_anchor_worker_is_there_and_nothing_waits(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, [Lazy(2, "lost"), Lazy(4, "lost")], True, *WALL)
    slow = [Lazy(0, "hung"), Lazy(0, "hung")]
    run.later = lambda: slow.pop()
    run.begin()
    while run.progress.tick < 16:
        run.tick()
    assert run.names == ["anchor lost"] * 2 and run.line.away == {0, 1} and run.line.under_way == {}
    for worker in run.workers:
        worker.fails = -1
    while run.progress.tick < TICKS:
        run.tick()
    assert run.names[2:] == ["anchor renewed"] * 2 and run.merged[-1][-1] > "M(θ16"


def test_newcomers_that_never_come_are_given_up_when_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, [Lazy(1, "lost")], True, *WALL, "swarm.start_timeout_s=2")
    run.policy.faults = FaultsConfig(budget=2)
    run.later = lambda: Lazy(0, "hung")
    run.to_the_end()
    assert run.names == ["anchor lost", "anchor lost", "anchor given up"] and run.merged == []


@pytest.mark.parametrize("lost", ["m_bar", "fire"])
@pytest.mark.parametrize("clock", [WALL, ("anchor.delay_k=5", "anchor.cadence=2")], ids=["wall", "lockstep"])
def test_a_checkpoint_is_written_without_what_went_with_its_node_where_that_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, clock: tuple[str, ...], lost: str
):
    run = Run(monkeypatch, [Lazy()], True, *clock).begin()
    while run.progress.tick < 12 or not run.corrections._unmerged():
        run.tick()
    monkeypatch.setattr(run.corrections.choice, "save", lambda versions: {"samples": sorted(versions)})
    found = ActorLost("it", "what a checkpoint keeps", "its node died")

    def salvaged(calls: dict[str, Any], *_: object) -> tuple[dict[str, Any], dict[str, ActorLost]]:
        gone = {name: found for name in calls if name.startswith(lost)}
        kept = {n: np.zeros(4, np.uint8) if n == "m_bar" else n for n in calls if n not in gone}
        return kept, gone

    monkeypatch.setattr(corrections, "salvaged", salvaged)
    if clock is not WALL:
        with pytest.raises(ActorLost, match="its node died") as caught:
            run.corrections.save()
        assert [blame.role for blame in blamed(caught.value, 1)] == ["anchor"]  # so it is known what to do about it
        return
    due = run.corrections._unmerged()[-1].due
    state, frames = run.corrections.save()
    assert run.events[-1][0] == "checkpoint without" and "its node died" in run.events[-1][1]["reason"]
    if lost == "m_bar":
        assert "m_bar" not in frames and state["pending"][-1]["due"]["version"] == due.version
    else:  # its samples are kept, as of one that is under way
        assert "m_bar" in frames and state["pending"] == [] and due.version in frames["samples"]
        assert {*frames} == {"m_bar", "samples"}


def test_an_average_that_went_with_its_node_begins_anew(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, [Lazy(7, "lost")], True, *WALL).begin()
    while "anchor lost" not in run.names:
        run.tick()
        run.gone = {str(run.line.m_bar), str(run.corrections.faults.m_bar)}
    run.gone = set()
    old = run.merged[-1]
    while run.progress.tick < TICKS:
        run.tick()
    assert "anchor average begins anew" in run.names and len(old) > 1
    assert any(len(word) == 1 for word in run.merged[1:]) and not set(old) & set(run.merged[-1])


@pytest.mark.parametrize("shared", [False, True])
def test_on_the_wall_clock_an_anchor_that_leaves_ends_what_it_is_at_and_gets_no_more(
    monkeypatch: pytest.MonkeyPatch, shared: bool
):
    weights = ("anchor.weights=shared", "anchor.cadence=2") if shared else ()
    run, asked = Run(monkeypatch, [Lazy()], False, *WALL, *weights).begin(), []
    old = run.workers[0]
    while run.workers[0] is old:
        run.tick()
        if run.progress.tick >= 5:
            asked.append(sum(name == "gradient" for name, _ in old.queue))
            run.leave(0)
        for fire in run.line.under_way.values():
            fire.report.value()
    assert len(set(asked)) == 1 and run.names == ["anchor renewed"]
    while run.progress.tick < TICKS:
        run.tick()
        for fire in run.line.under_way.values():
            fire.report.value()
    words = batches(run.merged)
    assert run.names == ["anchor renewed"] and len(words) > asked[0] and all(map(str.startswith, run.merged[-1], words))
