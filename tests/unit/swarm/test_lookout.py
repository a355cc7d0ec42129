"""What a wait that takes long costs: messages only then, an event that names the culprit, and an error with its stacks."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchor_service.errors import Hung
from swarm import lookout
from swarm.config import FaultsConfig
from swarm.doing import Doing, Wait
from swarm.lookout import Lookout

A, B = "worker d0p0", "worker d0p1"
LIMIT = 300.0, "swarm.timeout_s"


class Run:
    """Actors that say what `says` has for them, and records of events; `asked`: who was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, **says: Doing):
        self.events: list[dict[str, Any]] = []
        self.asked: list[str] = []
        doings = {A: says.get("a"), B: says.get("b")}

        def event(name: str, **fields: Any) -> None:
            self.events.append({"event": name} | fields)

        def actor(name: str) -> Any:
            remote = SimpleNamespace(remote=lambda: self.asked.append(name))
            return SimpleNamespace(doing=SimpleNamespace(options=lambda concurrency_group: remote))

        monkeypatch.setattr(lookout, "answered", lambda calls, _: {k: doings[k] for k in calls if doings[k]})
        monkeypatch.setattr(lookout, "stacks_of", lambda actors, _: {name: f"stacks of {name}" for name in actors})
        progress: Any = SimpleNamespace(event=event, tick=7)
        actors = {name: actor(name) for name in (A, B, "engine 0", "anchor 0", "anchor 1")}
        self.lookout = Lookout(FaultsConfig(), lambda: actors, progress, folder)
        for kind in ("tick", "generate train", "fire"):
            for _ in range(3):
                self.lookout.pace.observe(kind, 2.0)

    def wait(self, kind: str, since: float | None = None) -> Any:
        return self.lookout.wait(kind, "tick 7", LIMIT, since)


WAITS = Doing("tick, forward_backward", 3.0, Wait((A,), "an activation"))


def test_a_wait_that_is_as_usual_asks_nobody_and_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = Run(monkeypatch, tmp_path)
    with run.wait("new", since=time.monotonic() - 9) as alarm:
        assert alarm.slow_after == math.inf and (alarm.seconds, alarm.knob) == LIMIT
    with pytest.raises(ZeroDivisionError), run.wait("failed"):
        _ = 1 / 0
    assert run.asked == [] and run.events == [] and list(tmp_path.iterdir()) == []
    assert [len(run.lookout.pace._took[k]) for k in ("new", "failed")] == [1, 0]
    assert run.lookout.pace._took["new"][0] >= 9  # what was asked for before is remembered with all its time


def test_the_one_that_is_silent_is_named_and_not_the_one_that_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = Run(monkeypatch, tmp_path, b=WAITS)
    with run.wait("tick") as alarm:
        assert alarm.slow_after == 4.0 and (alarm.seconds, alarm.knob) == (60.0, "faults.hang_floor_s")
        alarm.slow([A, B])
        error = alarm.over([A, B])
    (event,) = run.events
    assert event["event"] == "slow" and event["who"] == A and event["usual"] == 2.0 and B not in event["reason"]
    assert isinstance(error, Hung) and error.who == A and error.doing == f"{A} does not answer"
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name == "7-worker-d0p0.txt" and file.read_text() == f"stacks of {A}"


def test_the_anchor_is_named_where_all_wait_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    waits = Doing("tick, anchor_wait", 3.0, Wait(("anchor 1",), "a correction"))
    run = Run(monkeypatch, tmp_path, a=waits, b=waits)
    with run.wait("tick") as alarm:
        assert alarm.over([A, B]).who == "anchor 1"
    assert [file.name for file in (tmp_path / "stacks").iterdir()] == ["7-anchor-1.txt"]


def test_engines_are_not_asked_and_those_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = Run(monkeypatch, tmp_path)
    with run.wait("generate train") as alarm:
        alarm.slow(["engine 0"])
    assert run.asked == [] and run.events[0]["who"] == "engine 0"


def test_what_nobody_waits_for_is_called_slow_once_and_hangs_in_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    run, now = Run(monkeypatch, tmp_path), time.monotonic()
    for since in (now, now - 5, now - 5, now - 50):
        run.lookout.look_after("fire", "anchor 0", "correction 4", (1.0, "anchor.timeout_s"), since)
    assert [event["who"] for event in run.events] == ["anchor 0"]
    with pytest.raises(Hung, match=r"faults\.hang_floor_s"):
        run.lookout.look_after("fire", "anchor 0", "correction 4", (1.0, "anchor.timeout_s"), now - 61)
    with pytest.raises(Hung, match=r"anchor\.timeout_s"):  # nothing is known of its kind
        run.lookout.look_after("new", "anchor 0", "correction 4", (1.0, "anchor.timeout_s"), now - 2)
