"""What a run does about a failure that reaches its driver, with coordinators that fail by script."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchor_service.errors import ActorLost, NotFinite, WaitTimeout
from deploy.cluster import lives
from deploy.cluster.endings import Notice, Terminated
from deploy.cluster.lives import Lives
from deploy.config import load
from rl.snapshot import BaseLost
from swarm.grid import PeerLost

LOST = ActorLost("worker d0p1", "tick 3", "killed")
HUNG = WaitTimeout("worker d0p0, worker d0p1, worker d1p0, worker d1p1", "tick 3", 300.0, "swarm.timeout_s")
PULLED = ActorLost("the swarm", "the snapshot of tick 3 or its replay", "its node died")
BROKE_OFF = PeerLost("worker d0p0: a norm with the stages of a replica failed: reset")
NO_ROOM = WaitTimeout("the Ray cluster", "room for 4 bundles (PACK)", 300.0, "swarm.start_timeout_s")


class Script:
    """What each coordinator does: the tick it comes to, and the error it ends of there; then the run is over."""

    def __init__(self, *acts: tuple[int, Exception | None], again: list[Exception] | None = None):
        self.acts, self.fails, self.restarts = list(acts), again or [], 0
        self.events: list[dict[str, Any]] = []

    def coordinator(self, config: Any, fleet: Any, telemetry: Any, run: Path, policy: Any) -> Any:
        progress = SimpleNamespace(tick=0, begin_anew=lambda: None, event=self._event)

        def play() -> None:
            progress.tick, error = self.acts.pop(0)
            if error:
                raise error

        return SimpleNamespace(progress=progress, run=play)

    def _event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name} | fields)

    def again(self) -> Any:
        self.restarts += 1
        if self.fails:
            raise self.fails.pop(0)
        return SimpleNamespace(again=self.again)


def play(script: Script, monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> None:
    monkeypatch.setattr(lives, "Coordinator", script.coordinator)
    config = load("k5", ["swarm.pp=2", *overrides])
    Lives(config, SimpleNamespace(again=script.again), None, folder).run()  # pyright: ignore


@pytest.mark.parametrize(
    "failure", [LOST, HUNG, PULLED, BROKE_OFF, BaseLost(0, 4, None)], ids=lambda e: type(e).__name__
)
def test_a_lost_process_costs_a_rewind_and_an_event(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    script = Script((7, failure), (9, None))
    play(script, monkeypatch, tmp_path)
    (event,) = script.events
    assert event["event"] == "rewound" and (event["from_tick"], event["to_tick"]) == (7, 0)
    assert str(failure) in event["reason"] and event["seconds"] >= 0 and script.restarts == 1


@pytest.mark.parametrize(
    "failure",
    [
        NotFinite("the loss is nan", "layer 3", "lower grpo.lr"),
        ValueError("a reward"),
        ActorLost("engine 0", "its model", "it could not be constructed: OSError"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_would_come_again_ends_the_run_at_once(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    script = Script((7, failure))
    with pytest.raises(type(failure)) as caught:
        play(script, monkeypatch, tmp_path)
    assert caught.value is failure and not script.restarts


def test_a_tick_that_fails_again_and_again_ends_with_the_last_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    last = ActorLost("worker d1p0", "tick 3", "killed once more")
    script = Script((3, LOST), (3, LOST), (3, last))
    with pytest.raises(ActorLost) as caught:
        play(script, monkeypatch, tmp_path, "faults.a_tick=2")
    assert caught.value is last and script.restarts == 2
    script = Script(*[(t, LOST) for t in (3, 4, 5, 6, 7)], (9, None))  # it comes on, if slowly
    play(script, monkeypatch, tmp_path, "faults.a_tick=2")
    assert script.restarts == 5


def test_a_budget_of_none_is_a_run_that_any_failure_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = Script((3, LOST))
    with pytest.raises(ActorLost):
        play(script, monkeypatch, tmp_path, "faults.budget=0")
    assert not script.restarts


def test_a_failure_on_the_way_back_is_one_more_of_that_tick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = Script((3, LOST), (9, None), again=[LOST, LOST])
    play(script, monkeypatch, tmp_path)
    assert script.restarts == 3 and len(script.events) == 1
    script = Script((3, LOST), again=[LOST] * 9)
    with pytest.raises(ActorLost):
        play(script, monkeypatch, tmp_path)
    assert script.restarts == 3


def test_where_no_node_has_room_any_more_the_error_says_so_and_of_what_it_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    script = Script((3, LOST), again=[NO_ROOM])
    with pytest.raises(WaitTimeout, match="room for 4 bundles") as caught:
        play(script, monkeypatch, tmp_path)
    assert caught.value.__cause__ is LOST


@pytest.mark.parametrize(
    ("overrides", "saved"),
    [
        (["run.checkpoint_every=4"], [2]),
        (["run.checkpoint_every=2"], []),  # it has just been written
        (["run.checkpoint_every=0"], []),
        (["run.checkpoint_every=4", "snapshot.rate=0.05"], []),
    ],
)
def test_a_run_that_is_told_to_end_does_so_with_its_step(
    overrides: list[str], saved: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    notice, found = Notice(), list[int]()

    def coordinator(*args: Any) -> Any:
        made = SimpleNamespace(progress=SimpleNamespace(step=0), save=lambda: found.append(made.progress.step))

        def run() -> None:
            while made.progress.step < 6:
                made.progress.step += 1
                notice.given = notice.given or made.progress.step == 2
                made.after_step()

        made.run = run
        return made

    monkeypatch.setattr(lives, "Coordinator", coordinator)
    with pytest.raises(Terminated):
        Lives(load("k5", overrides), None, None, tmp_path, notice).run()  # pyright: ignore
    assert found == saved


def test_what_is_lost_after_notice_was_given_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script, notice = Script((3, LOST)), Notice()
    notice.given = True
    monkeypatch.setattr(lives, "Coordinator", script.coordinator)
    with pytest.raises(Terminated):
        Lives(load("k5"), SimpleNamespace(again=script.again), None, tmp_path, notice).run()  # pyright: ignore
    assert not script.restarts
