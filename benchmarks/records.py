"""What a run of a benchmark has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kept_records(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, in their order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
