"""How many replicas a run is to have from its next step on: asked for by a file in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from swarm.json_lines import replace_text


def _file(run: Path) -> Path:
    return run / "scale.json"


def ask_for(run: Path, dp: int) -> None:
    """Whole or not at all."""
    replace_text(_file(run), json.dumps({"dp": dp}))


def forget(run: Path) -> None:
    """Nothing is asked for any more."""
    _file(run).unlink(missing_ok=True)


def wanted(run: Path) -> int | None:
    """None if nothing was asked for."""
    try:
        dp = json.loads(_file(run).read_text())["dp"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dp if isinstance(dp, int) and dp > 0 else None
