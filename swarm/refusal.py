"""What the driver looks at on the wall clock before any rank gets a correction: its report. Ranks look at the frames."""

from __future__ import annotations

from typing import Any

from anchor_service.errors import NotFinite
from anchor_service.lag import Due
from anchor_service.messages import NORM, VOID
from anchor_service.norms import NormHistory


def fault_of(due: Due, report: dict[str, Any], norms: NormHistory, on_nan: str) -> str:
    """Why no rank is to get this correction; "" if all are. Raises NotFinite where its M was not and that stops the run.

    Signs have no size: a lie in them shows to `calibrated`, which compares them with G_comp of the same samples, and not here.
    """
    if VOID in report:
        error = NotFinite(*report[VOID])
        if on_nan == "stop":
            raise error
        return str(error)
    said = report["version"], report["source_tick"]
    if said != (due.version, due.source_tick):
        return f"it says it is version {said[0]} of source tick {said[1]}, not {due.version} of {due.source_tick}"
    return norms.judge(report[NORM], due.source_tick)
