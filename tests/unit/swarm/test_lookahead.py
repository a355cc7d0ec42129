"""Which weights sample which step, by real `Rollouts` on engines that do a call only when somebody waits for it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anchor_service.errors import ActorLost, WaitTimeout
from anchor_service.line import NoFires
from codec.frames import FrameError
from deploy.config import load
from rl.batch import Batch
from rl.engine import EngineFailed
from rl.problems import Problems
from rl.snapshot import BaseLost
from swarm import engine_line
from swarm.blame import blamed
from swarm.checkpoint import CheckpointError
from swarm.config import FaultsConfig
from swarm.engine_line import EngineLine
from swarm.failure_policy import FailurePolicy
from swarm.progress import Progress
from swarm.rollouts import STALENESS, Rollouts
from tests.conftest import make_batch

TICKS = 2  # a step
FAILURES = {
    "base": BaseLost(0, 2, None),
    "load": EngineFailed("new weights", "they are not in use", "start the run anew"),
    "lost": ActorLost("an engine", "its call", "it was killed"),
    "hung": WaitTimeout("an engine", "its call", 5.0, "rollout.timeout_s"),
}


class Lazy:
    """An engine: calls queue up, and are done up to the one that is waited for. Call number `fails` fails."""

    def __init__(self, fails: int = -1, failure: str = ""):
        self.held, self.failure = 0, failure  # the model's files
        self.queue: list[tuple[str, Any]] = []
        self.done: dict[int, Any] = {}
        self.fails = fails
        names = "gen", "load", "catch_up"
        self.generate, self.load_weights, self.catch_up = (SimpleNamespace(remote=self._asked(n)) for n in names)

    def _asked(self, name: str):
        def remote(*args: Any) -> tuple[Lazy, int]:
            self.queue.append((name, args))
            return self, len(self.queue) - 1

        return remote

    def until(self, number: int) -> Any:
        for i in range(len(self.done), number + 1):
            if i >= self.fails >= 0 and self.failure == "hung":
                raise FAILURES["hung"]
            self.done[i] = self._do(i, *self.queue[i])
        if isinstance(self.done[number], Exception):
            raise self.done[number]
        return self.done[number]

    def _do(self, number: int, name: str, args: tuple[Any, ...]) -> Any:
        dead = number > self.fails >= 0 and self.failure == "lost"
        if number == self.fails or dead:
            self.held = None
            return FAILURES[self.failure]
        if name == "gen":
            (ask,) = args
            held = -1 if self.held is None else self.held  # -1: samples of no known weights
            return np.array([ask.split == "val", ask.step, held, ask.indices[0]], np.int64).view(np.uint8), 0.5, {}
        if name == "catch_up":
            tick, _, (whole, base, _), *back = args
            assert whole
            self.held = tick
            for whole, base, tick in back:
                assert tick == self.held
                if whole:
                    return FrameError("stage 0", "base_tick", "nothing leads back")
                self.held = base
            return f"digest of {self.held}"
        tick, (whole, base, _) = args
        if not whole and base != self.held:
            self.held = None
            return BaseLost(0, base, self.held)
        self.held = tick
        return f"digest of {tick}"


class Run:
    """The coordinator's order of events around `Rollouts`, on lazy engines."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        staleness: int,
        steps: int,
        engines: list[Lazy],
        swift: bool,
        *more: str,
        later: Callable[[], Lazy] = lambda: Lazy(),
    ):
        sets = [f"rollout.max_staleness={staleness}", f"run.steps={steps}", "rollout.batch_size=2"]
        self.config = load("k5", [*sets, "grpo.rollout_is=token", *more])
        self.events: list[str] = []
        told: dict[str, Any] = {"event": lambda step, tick, name, **more: self.events.append(name)}
        self.progress = Progress(SimpleNamespace(**told, samples=lambda *_: None))
        self.tick, self.engines, self.later = 0, engines, later  # both ends begin with the model's files
        self.reborn: set[int] = set()  # ticks after which a rank is new: what it sends then is whole
        self.fleet = SimpleNamespace(
            engines=engines,
            renew=self._renew,
            arrival=lambda engine: (engine, None),
            arrived=lambda engine, node: None,
            dismiss=lambda engine: setattr(engine, "failure", "lost") or setattr(engine, "fails", len(engine.done)),
            weights=self._weights,
            nodes=lambda actors: {"the node"} if actors else set(),
            engine_limit=(5.0, "rollout.timeout_s"),
            gather=_gather,
            wait_for=lambda name, ready, since: _gather([(name, ready)])[0],
        )

        _patch(monkeypatch, swift)
        self.policy = FailurePolicy(FaultsConfig())
        line = EngineLine(self.config, self.fleet, self.progress, NoFires(), self.policy)
        self.rollouts = Rollouts(self.config, self.progress, line)
        self.used: list[tuple[int, int, int]] = []  # step, ticks of the weights that sampled it, staleness recorded

    def _renew(self, role: str, index: int) -> Lazy:
        assert role == "engine"
        self.fleet.engines[index] = new = self.later()
        return new

    def _weights(self, tick: int, stream: str, whole: bool, exact: bool = True) -> tuple[list[object], int, bool]:
        assert not whole or tick == self.tick  # else a step would be made that the others never see
        base, self.tick = self.tick, tick
        new = self.config.snapshot.encoding == "delta" and tick in self.reborn
        return [(whole or new or self.config.snapshot.encoding == "full", base, tick)], 10, whole or new

    def begin(self) -> None:
        self.rollouts.begin()
        self.rollouts.sync()

    def step(self) -> None:
        self.progress.step += 1
        results, found = self.rollouts.train()
        step, tick = self.progress.step, set()
        for part, (frame, *_) in enumerate(results):
            val, of, held, first = frame.view(np.int64)
            assert (val, of, first) == (0, step, (step - 1) * 16 + 2 * part)
            tick.add(int(held))
        (held,) = tick  # one step, one set of weights
        self.used.append((step, held, found[STALENESS]))
        self.progress.tick += TICKS
        self.rollouts.sync()

    def validate(self) -> None:
        answered, _ = self.rollouts.validation()
        (one,) = answered.values()
        results: Any = one.batch  # what the engines gave, as `_patch` takes it
        assert {int(frame.view(np.int64)[2]) for frame, *_ in results} == {self.progress.tick}


def _patch(monkeypatch: pytest.MonkeyPatch, swift: bool) -> None:
    """Calls of lazy engines in the place of Ray's; `swift`: what is asked for is done at once."""

    def done_of(refs: list[Any]) -> tuple[list[Any], list[Any]]:
        if swift:
            _do_all(refs)
        over = [number is not None and number in engine.done for engine, number in refs]
        return [ref for ref, is_over in zip(refs, over) if is_over], [ref for ref, o in zip(refs, over) if not o]

    def raised(reference: tuple[Lazy, int], who: str) -> Exception | None:
        try:
            reference[0].until(reference[1])
        except ActorLost as lost:
            return ActorLost(who, "its call", lost.reason)
        except Exception as error:
            return error
        return None

    monkeypatch.setattr(engine_line, "done_of", done_of)
    monkeypatch.setattr(engine_line, "raised", raised)
    monkeypatch.setattr(Rollouts, "_taken", lambda self, split, results: (results, {}))
    monkeypatch.setattr(EngineLine, "problems", lambda self: [Problems()])
    monkeypatch.setattr(Rollouts, "_judge_ends", lambda self, batch: None)


def _gather(calls: list[tuple[str, Any]], *_: object) -> list[Any]:
    if any(engine.failure == "hung" for _, (engine, _) in calls):  # until the deadline the others work on
        _do_all([reference for _, reference in calls])
    return [number is None or engine.until(number) for _, (engine, number) in calls]


def _do_all(refs: list[Any]) -> list[Any]:
    for engine, number in refs:
        try:
            if number is not None:
                engine.until(number)
        except (BaseLost, EngineFailed, ActorLost, WaitTimeout):
            pass
    return refs


def lawful(steps: int, staleness: int) -> list[tuple[int, int, int]]:
    """From the words: step t trains on samples of the weights after step max(0, t-1-s)."""
    of = [max(0, t - 1 - staleness) for t in range(1, steps + 1)]
    return [(t, TICKS * w, t - 1 - w) for t, w in enumerate(of, 1)]


# --- the law -----------------------------------------------------------------------------------


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize(("staleness", "engines", "every"), itertools.product([0, 1, 2, 5], [1, 2, 3], [1, 3, 99]))
def test_a_step_trains_on_samples_of_the_weights_that_the_law_says(
    monkeypatch: pytest.MonkeyPatch, staleness: int, engines: int, every: int, swift: bool
):
    held = [Lazy() for _ in range(engines)]
    run = Run(monkeypatch, staleness, 7, held, swift)
    run.begin()
    run.validate()
    for step in range(1, 8):
        run.step()
        if step % every == 0 or step == 7:
            run.validate()
    assert run.used == lawful(7, staleness) and run.events == []
    asked = Counter(
        (a.step, a.indices) for e in held for name, (a, *_) in e.queue if name == "gen" and a.split != "val"
    )
    assert max(step for step, _ in asked) == 7 and set(asked.values()) == {1}  # none beyond the end, none twice
    assert run.rollouts.ahead.asked == []


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_nothing_but_the_samples_that_are_due_is_waited_for(monkeypatch: pytest.MonkeyPatch, staleness: int):
    """Where nobody waits, a lazy engine does nothing: behind the due step all of the queue is still to do."""
    engine = Lazy()
    run = Run(monkeypatch, staleness, 9, [engine], swift=False)
    run.begin()
    for step in range(1, 10):
        run.step()
        name, (ask, *_) = engine.queue[len(engine.done) - 1]
        assert name == "gen" and ask.step == step
        asked = max(a.step for name, (a, *_) in engine.queue if name == "gen")
        assert asked == min(9, step + staleness)


# --- failures ----------------------------------------------------------------------------------


def to_the_end(run: Run, steps: int = 8) -> Run:
    run.begin()
    for step in range(1, steps + 1):
        run.step()
        if step % 3 == 0 or step == steps:
            run.validate()
    return run


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_whatever_call_fails_the_samples_are_those_of_a_run_without_failures(
    monkeypatch: pytest.MonkeyPatch, staleness: int, failure: str, swift: bool
):
    """And nothing that the other engine was asked for is asked a second time."""
    for fails in (*range(12), 15, 20, 26):
        first, other, made = Lazy(fails, failure), Lazy(), []

        def later() -> Lazy:
            made.append(Lazy())  # noqa: B023
            return made[-1]  # noqa: B023

        sets = f"snapshot.encoding={'full' if fails % 4 == 3 else 'delta'}"
        run = to_the_end(Run(monkeypatch, staleness, 8, [first, other], swift, sets, later=later))
        assert run.used == lawful(8, staleness)
        hung = failure == "hung" and len(first.queue) > fails
        assert len(run.events) == (hung or fails in first.done)
        assert set(run.events) <= {"engine renewed", "weights resynchronised"}
        asked = [
            [(a.split, a.step, a.indices) for name, (a, *_) in e.queue if name == "gen" and a.split != "val"]
            for e in (first, other, *made)
        ]
        mine = {ask for i, ask in enumerate(asked[0])}
        assert len(asked[1]) == len(set(asked[1]))
        assert not (set(asked[1]) - mine) & {ask for of in asked[2:] for ask in of if of.count(ask) > 1}


@pytest.mark.parametrize("staleness", [0, 2])
def test_newcomers_that_fail_too_are_dealt_with_likewise(monkeypatch: pytest.MonkeyPatch, staleness: int):
    for failure, fails, engines in itertools.product(("lost", "hung", "load"), range(1, 9), (1, 2)):
        later = iter([Lazy(fails, failure), Lazy(2, failure)])
        held = [Lazy(3, failure), *(Lazy() for _ in range(engines - 1))]
        new = lambda: next(later, Lazy())  # noqa: B023, E731
        run = to_the_end(Run(monkeypatch, staleness, 8, held, False, later=new))
        assert run.used == lawful(8, staleness) and 1 <= len(run.events) <= 3


def test_engines_that_fail_again_and_again_end_the_run_with_the_last_error(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, 0, 8, [Lazy(0, "load")], False, later=lambda: Lazy(0, "load"))
    with pytest.raises(EngineFailed, match="new weights"):
        run.begin()
    assert run.events == ["engine renewed"] * run.policy.faults.a_tick


def test_all_engines_of_a_node_are_one_failure(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch, 0, 8, [Lazy(1, "lost") for _ in range(5)], True)
    to_the_end(run)
    assert run.used == lawful(8, 0) and run.events == ["engine renewed"] * 5
    assert run.policy.dealt == {"engine": 1}


def test_others_are_asked_at_once_for_what_a_lost_engine_owes(monkeypatch: pytest.MonkeyPatch):
    """Batches of the step go on in the engines that are there; the newcomer gets weights and nothing else."""
    run = Run(monkeypatch, 0, 3, [Lazy(2, "lost"), Lazy(), Lazy()], False)
    gone, one, two = run.engines
    run.begin()
    run.step()
    owed = [a for name, (a, *_) in gone.queue if name == "gen"]
    (new,) = set(run.fleet.engines) - {one, two}
    assert [name for name, _ in new.queue] == ["catch_up", "load"]
    asked = [[a for name, (a, *_) in engine.queue if name == "gen"] for engine in (one, two)]
    assert [a for of in asked for a in of if a in owed[1:]] and len(asked[0]) + len(asked[1]) == 8 - (
        owed[0] not in asked
    )


def test_coded_steps_cannot_be_taken_back_so_what_is_owed_of_older_weights_is_asked_of_the_newest(
    monkeypatch: pytest.MonkeyPatch,
):
    """Two engines, s=2: one is lost before step 4, so 4 and 5 are sampled from the weights after step 3."""
    run = Run(monkeypatch, 2, 9, [Lazy(), Lazy()], False, "snapshot.rate=0.05")
    run.begin()
    for step in range(1, 10):
        if step == 4:
            run.engines[1].fails, run.engines[1].failure = len(run.engines[1].done), "lost"
        run.step()
    assert run.events == ["engine renewed"]
    assert [stale for *_, stale in run.used] == [0, 1, 2, 0, 1, 2, 2, 2, 2]
    assert all(held == TICKS * (step - 1 - stale) for step, held, stale in run.used)  # what is recorded is true


WALL = "anchor.clock=wall"
OVER_WHOLE = [(1, [0, 1, 2, 2, 2, 2, 2]), (2, [0, 1, 2, 0, 2, 2, 2]), (3, [0, 1, 2, 0, 1, 2, 2])]


def _over_a_whole_frame(monkeypatch: pytest.MonkeyPatch, after: int, fails: Callable[[Run], None], *sets: str) -> Run:
    """s=2, two engines: the weights after step `after` come whole; before step 4 it `fails`, and 4, 5 are owed of older ones."""
    run = Run(monkeypatch, 2, 7, [Lazy(), Lazy()], False, *sets)
    run.reborn = {TICKS * after}
    run.begin()
    for step in range(1, 8):
        if step == 4:
            fails(run)
        run.step()
    return run


def _dies(run: Run, failure: str = "lost") -> None:
    run.engines[1].fails, run.engines[1].failure = len(run.engines[1].done), failure


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("after", "stale"), OVER_WHOLE)
def test_on_the_wall_clock_what_is_owed_of_weights_before_a_whole_frame_is_asked_of_the_newest(
    monkeypatch: pytest.MonkeyPatch, after: int, stale: list[int], failure: str
):
    """And of those since then as ever."""
    run = _over_a_whole_frame(monkeypatch, after, lambda run: _dies(run, failure), WALL)
    assert run.events == ["engine renewed"]  # and what is recorded is true
    assert run.used == [(step, TICKS * (step - 1 - s), s) for step, s in enumerate(stale, 1)]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("after", [2, 3])
def test_in_lockstep_an_engine_that_owes_samples_of_weights_before_a_whole_frame_is_blamed_and_the_run_rewinds(
    monkeypatch: pytest.MonkeyPatch, after: int, failure: str
):
    with pytest.raises((ActorLost, WaitTimeout)) as raised:
        _over_a_whole_frame(monkeypatch, after, lambda run: _dies(run, failure))
    assert {blame.role for blame in blamed(raised.value, 1)} == {"engine"}
    if failure in ("base", "load"):
        assert raised.value.who == "engine 1" and str(FAILURES[failure]) in str(raised.value)


def test_in_lockstep_a_whole_frame_before_all_that_is_owed_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    run = _over_a_whole_frame(monkeypatch, 1, _dies)
    assert run.used == lawful(7, 2) and run.events == ["engine renewed"]


@pytest.mark.parametrize(("after", "stale"), OVER_WHOLE)
def test_an_engine_that_leaves_in_order_delivers_in_lockstep_what_nobody_else_can(
    monkeypatch: pytest.MonkeyPatch, after: int, stale: list[int]
):
    leaves: Callable[[Run], None] = lambda run: run.rollouts.engines.replace(1, Lazy(), "its node is draining")  # noqa: E731
    run = _over_a_whole_frame(monkeypatch, after, leaves)
    assert run.used == lawful(7, 2) and run.events == ["engine renewed"]
    run = _over_a_whole_frame(monkeypatch, after, leaves, WALL)
    assert [found for *_, found in run.used] == stale and run.events == ["engine renewed"]


# --- checkpoints -------------------------------------------------------------------------------


def _saved(run: Run, folder: Path) -> dict[str, Any]:
    state, frames = run.rollouts.save()
    for name, frame in frames.items():
        (folder / f"{name}.frame").write_bytes(frame.tobytes())
    return state | {"step": run.progress.step}


def _resumed(monkeypatch: pytest.MonkeyPatch, staleness: int, steps: int, folder: Path, state: dict[str, Any]) -> Run:
    run = Run(monkeypatch, staleness, steps, [Lazy()], swift=False)
    run.progress.step, run.progress.tick = state["step"], TICKS * state["step"]
    run.rollouts.restore(folder, state)
    run.begin()
    for _ in range(state["step"], steps):
        run.step()
    return run


@pytest.mark.parametrize(("staleness", "at"), itertools.product([0, 1, 2, 4], range(1, 8)))
def test_a_run_that_goes_on_uses_the_samples_that_one_never_stopped_uses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, staleness: int, at: int
):
    run = Run(monkeypatch, staleness, 8, [Lazy(), Lazy()], swift=False)
    run.begin()
    for _ in range(at):
        run.step()
    state = _saved(run, tmp_path)
    assert [saved["step"] for saved in state["samples"]] == list(range(at + 1, min(8, at + staleness) + 1))
    resumed = _resumed(monkeypatch, staleness, 8, tmp_path, state)
    assert resumed.used == lawful(8, staleness)[at:] and resumed.events == []
    shorter = _resumed(monkeypatch, staleness, max(at, 6), tmp_path, state)
    assert shorter.used == lawful(max(at, 6), staleness)[at:] and shorter.events == []


def test_a_run_made_longer_says_that_the_samples_ahead_of_its_old_end_are_newer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    run = Run(monkeypatch, 2, 4, [Lazy()], swift=False)
    run.begin()
    for _ in range(4):
        run.step()
    longer = _resumed(monkeypatch, 2, 8, tmp_path, _saved(run, tmp_path))
    assert longer.events == ["samples ahead not saved"]
    assert [stale for *_, stale in longer.used] == [0, 1, 2, 2]


def test_samples_that_a_checkpoint_lacks_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = Run(monkeypatch, 1, 4, [Lazy()], swift=False)
    run.begin()
    run.step()
    state = _saved(run, tmp_path)
    (tmp_path / "samples-2-0.frame").unlink()
    with pytest.raises(CheckpointError, match="samples-2-0"):
        _resumed(monkeypatch, 1, 4, tmp_path, state)


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize(("staleness", "engines"), itertools.product([0, 1, 3], [1, 2]))
def test_an_engine_that_leaves_in_order_takes_no_samples_with_it(
    monkeypatch: pytest.MonkeyPatch, staleness: int, engines: int, swift: bool
):
    """Nothing waits for its start, and what it has delivered is not asked for again."""
    for leaves, encoding in itertools.product(range(1, 8), ("delta", "full")):
        held, new = [Lazy() for _ in range(engines)], Lazy()
        old, run = held[0], Run(monkeypatch, staleness, 8, held, swift, f"snapshot.encoding={encoding}")
        run.begin()
        for step in range(1, 9):
            run.step()
            if step == leaves:
                run.rollouts.engines.replace(0, new, "its node is draining")
        run.validate()
        assert run.used == lawful(8, staleness) and run.events == ["engine renewed"]
        asked = [[(a.step, a.indices) for name, (a, *_) in e.queue if name == "gen"] for e in (old, new)]
        done = {
            (a.step, a.indices)
            for i, (name, (a, *_)) in enumerate(old.queue)
            if name == "gen" and i in old.done and not isinstance(old.done[i], Exception)
        }
        assert not done & {*asked[1]}


# --- sampled again ------------------------------------------------------------------------------


def rewarded(groups: list[tuple[float, ...]], first: int) -> Batch:
    """Groups of these rewards, whose prompts are numbered from `first`."""
    rewards = np.array(groups, np.float32).reshape(-1)
    whole = make_batch(len(rewards))
    return replace(
        whole,
        rewards=rewards,
        advantages=np.repeat(np.arange(first, first + len(groups)), len(groups[0])).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("most", "asked", "groups"), [(1, 1, [0, 1, 2]), (2, 2, [0, 1, 4]), (3, 3, [1, 4, 6]), (9, 3, [1, 4, 6])]
)
def test_groups_of_one_reward_are_replaced_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, most: int, asked: int, groups: list[int]
):
    """DAPO's dynamic sampling: the first that differ, in the order of sampling; at the bound, of the rest the first."""
    same, other = (1.0, 1.0), (0.0, 1.0)
    sampled = [
        rewarded(found, 3 * i)
        for i, found in enumerate([[same, other, same], [same, other, same], [other, other, other]])
    ]
    rollouts, seen = Rollouts.__new__(Rollouts), []
    sizes = ["grpo.train_batch_size=3", "grpo.ppo_mini_batch_size=3", "grpo.group_size=2", "rollout.batch_size=4"]
    rollouts.config = load("k5", [*sizes, f"grpo.filter_groups.max_num_gen_batches={most}"])
    rollouts.engines = SimpleNamespace(ask=lambda step, prompts: seen.extend(prompts))
    monkeypatch.setattr(rollouts, "_delivered", lambda asked: [])
    monkeypatch.setattr(rollouts, "_taken", lambda split, results, shown: (sampled[len(seen)], {}))
    batch, found = rollouts._filtered(sampled[0], 7)
    assert batch.advantages.tolist() == [g for g in groups for _ in range(2)]
    assert len(seen) == asked - 1 and found.get("training/num_gen_batches", 1) == asked
    prompts = [i for ask in seen for i in ask.indices]
    assert len(set(prompts)) == len(prompts) == 3 * (asked - 1) and all(i > 1 << 31 for i in prompts)
    assert all((ask.split, ask.step, ask.n) == ("train", 7, 2) for ask in seen)
