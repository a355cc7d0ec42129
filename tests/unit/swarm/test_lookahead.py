"""Which weights sample which step, by real `Rollouts` on engines that do a call only when somebody waits for it."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anchor_service.errors import ActorLost
from anchor_service.line import NoFires
from deploy.config import load
from rl.engine import EngineFailed
from rl.snapshot import BaseLost
from swarm import rollouts
from swarm.checkpoint import CheckpointError
from swarm.progress import Progress
from swarm.rollouts import STALENESS, Rollouts

TICKS = 2  # a step
FAILURES = {
    "base": BaseLost(0, 2, None),
    "load": EngineFailed("new weights", "they are not in use", "start the run anew"),
    "lost": ActorLost("an engine", "its call", "it was killed"),
}


class Lazy:
    """An engine: calls queue up, and are done up to the one that is waited for. Call number `fails` fails."""

    def __init__(self, fails: int = -1, failure: str = ""):
        self.held, self.base, self.failure = -1, None, failure
        self.queue: list[tuple[str, Any]] = []
        self.done: dict[int, Any] = {}
        self.fails = fails
        self.generate, self.load_weights = (SimpleNamespace(remote=self._asked(name)) for name in ("gen", "load"))

    def _asked(self, name: str):
        def remote(*args: Any) -> tuple[Lazy, int]:
            self.queue.append((name, args))
            return self, len(self.queue) - 1

        return remote

    def until(self, number: int) -> Any:
        for i in range(len(self.done), number + 1):
            self.done[i] = self._do(i, *self.queue[i])
        if isinstance(self.done[number], Exception):
            raise self.done[number]
        return self.done[number]

    def _do(self, number: int, name: str, args: tuple[Any, ...]) -> Any:
        dead = number > self.fails >= 0 and self.failure == "lost"
        if number == self.fails or dead:
            self.held = self.base = None
            return FAILURES[self.failure]
        if name == "gen":
            (ask,) = args
            held = -1 if self.held is None else self.held  # -1: samples of no known weights
            return np.array([ask.split == "val", ask.step, held, ask.indices[0]], np.int64).view(np.uint8), 0.5, {}
        tick, (whole, base) = args
        if not whole and base != self.base:
            return BaseLost(0, base, self.base)
        self.held = self.base = tick
        return f"digest of {tick}"


class Run:
    """The coordinator's order of events around `Rollouts`, on lazy engines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, staleness: int, steps: int, engines: list[Lazy], swift: bool):
        sets = [f"rollout.max_staleness={staleness}", f"run.steps={steps}", "rollout.batch_size=2"]
        self.config = load("k5", [*sets, "grpo.rollout_is=token"])
        self.events: list[str] = []
        self.progress = Progress(SimpleNamespace(event=lambda step, tick, name, **more: self.events.append(name)))
        self.base, self.engines = None, engines  # both ends begin with the model's files
        new = lambda: [Lazy() for _ in self.engines]  # noqa: E731
        self.fleet = SimpleNamespace(
            engines=engines,
            new_engines=new,
            weights=self._weights,
            nodes=lambda actors: {"the node"} if actors else set(),
            engine_limit=(5.0, "rollout.timeout_s"),
            gather=lambda calls, *_: [engine.until(i) for _, (engine, i) in calls],
        )
        monkeypatch.setattr(rollouts, "done_of", lambda refs: ([], refs) if not swift else (_do_all(refs), []))
        monkeypatch.setattr(Rollouts, "_taken", lambda self, split, results: (results, {}))
        monkeypatch.setattr(Rollouts, "_problems", lambda self: SimpleNamespace(sources=[], validation=None))
        monkeypatch.setattr(Rollouts, "_judge_ends", lambda self, batch: None)
        self.rollouts = Rollouts(self.config, self.fleet, self.progress, NoFires())
        self.used: list[tuple[int, int, int]] = []  # step, ticks of the weights that sampled it, staleness recorded

    def _weights(self, tick: int, stream: str, whole: bool, exact: bool) -> tuple[list[object], int]:
        base, self.base = self.base, tick
        return [(whole, base)], 10

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
        results, _ = self.rollouts.validation()
        assert {int(frame.view(np.int64)[2]) for frame, *_ in results} == {self.progress.tick}


def _do_all(refs: list[Any]) -> list[Any]:
    for engine, number in refs:
        try:
            engine.until(number)
        except (BaseLost, EngineFailed, ActorLost):
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


@pytest.mark.parametrize("swift", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_whatever_call_fails_no_sample_of_unknown_or_older_weights_is_used(
    monkeypatch: pytest.MonkeyPatch, staleness: int, failure: str, swift: bool
):
    for fails in range(1, 30):
        first = Lazy(fails, failure)
        run = Run(monkeypatch, staleness, 8, [first, Lazy()], swift)
        run.begin()
        for step in range(1, 9):
            run.step()
            if step % 3 == 0 or step == 8:
                run.validate()
        used, law = run.used, lawful(8, staleness)
        assert [step for step, *_ in used] == list(range(1, 9))
        assert all(held == TICKS * (step - 1 - stale) for step, held, stale in used)  # what is recorded is true
        assert all(0 <= stale <= at_most for (_, _, stale), (_, _, at_most) in zip(used, law))
        assert len(run.events) == (fails in first.done)
        if staleness == 0:
            assert used == law


def test_what_was_in_flight_is_asked_again_of_the_newest_weights(monkeypatch: pytest.MonkeyPatch):
    """Two engines, s=2: one is lost before step 4, so 4, 5 and 6 are sampled from the weights after step 3."""
    run = Run(monkeypatch, 2, 9, [Lazy(), Lazy()], swift=False)
    run.begin()
    for step in range(1, 10):
        if step == 4:
            run.engines[1].fails, run.engines[1].failure = len(run.engines[1].done), "lost"
        run.step()
    assert run.events == ["engines started anew"]
    assert [stale for *_, stale in run.used] == [0, 1, 2, 0, 1, 2, 2, 2, 2]


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
