"""On the wall clock the driver looks at the report of a correction before any rank gets it; M̄ goes on without a bad one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anchor_service.actor import Anchor
from anchor_service.errors import NotFinite
from anchor_service.lag import Due
from anchor_service.line import Fire, FireLine
from anchor_service.messages import NORM, VOID, unpack_correction
from anchor_service.norms import NormHistory
from swarm.corrections import Corrections

VOIDED = NotFinite("the anchor: its gradient at the weights of tick 4 is not finite", "its own passes", "float32")


class Line(FireLine):
    """Fires that are done, with reports at hand."""

    def __init__(self, reports: list[dict[str, Any]]):
        super().__init__([], 1, 1.0, None)
        self.delivered: list[int] = []
        for version, report in enumerate(reports, 1):
            said = {"version": version, "source_tick": version, NORM: 1.0} | report
            self.add(Fire(Due(version, version, None), 0, said, f"M̄ {version}", []))

    def arrived(self) -> list[Fire]:
        return [fire for fire in self.under_way.values() if not fire.delivered]

    def report(self, fire: Fire) -> Any:
        return fire.report

    def deliver(self, fire: Fire, ranks: Any) -> None:
        fire.delivered = True
        self.delivered.append(fire.due.version)

    def check_deliveries(self) -> None: ...


def _driver(reports: list[dict[str, Any]], on_nan: str = "skip") -> tuple[Corrections, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    found = object.__new__(Corrections)
    given: dict[str, list[int]] = {"back": []}
    found.clock = SimpleNamespace(waits=False, finished=lambda version: None)
    found.choice = SimpleNamespace(release=lambda version: None, give_back=given["back"].append)
    found.progress = SimpleNamespace(event=lambda name, **fields: events.append({"event": name} | fields))
    found.fleet, found.swarm = SimpleNamespace(workers=[]), SimpleNamespace(on_nan=on_nan)
    found.line, found.norms, found._last_m_bar = Line(reports), NormHistory(10.0), "none"
    return found, events


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({NORM: 50.0}, "anchor.norm_bound"),
        ({NORM: float("inf")}, "its norm is inf"),
        ({"source_tick": 40}, "of source tick 40, not 6"),
        ({"version": 5}, "version 5"),
        ({VOID: list(VOIDED.args)}, "its gradient at the weights of tick 4 is not finite"),
    ],
)
def test_a_correction_that_cannot_be_is_given_to_nobody_and_m_bar_goes_on_without_it(lie: dict[str, Any], reason: str):
    driver, events = _driver([{}] * 5 + [lie])
    driver.deliver()
    assert driver.line.delivered == [1, 2, 3, 4, 5] and driver.line.m_bar == "M̄ 5"
    (event,) = events
    assert (event["event"], event["version"]) == ("correction refused", 6) and reason in event["reason"]
    assert list(driver.norms.taken) == [1.0] * 5


def test_an_m_that_is_not_finite_stops_a_run_that_is_to_stop():
    driver, _ = _driver([{VOID: list(VOIDED.args)}], on_nan="stop")
    with pytest.raises(NotFinite, match="tick 4"):
        driver.deliver()


@pytest.mark.parametrize("m_bar", [None, np.ones(3, np.float32)])
def test_the_anchor_says_so_in_place_of_a_correction_and_keeps_m_bar(m_bar: np.ndarray | None):
    anchor = object.__new__(Anchor)
    anchor.dense = SimpleNamespace(stages=[0, 1])
    report, kept, *frames = anchor.publish(
        {"version": 7, VOID: list(VOIDED.args)}, np.full(3, np.nan, np.float32), m_bar
    )
    assert kept is m_bar and report["bytes"] == sum(report["stage_bytes"]) == sum(f.nbytes for f in frames)
    for stage, frame in enumerate(frames):
        with pytest.raises(NotFinite) as caught:
            unpack_correction(frame, stage, 3)
        assert str(caught.value) == str(VOIDED)
