"""Runs as a small CSV file: what a results page keeps of folders that are too large to keep."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs import Run

LAST = 5  # steps whose mean is "at the end": single steps are noisy
AT_END = {"response_length": "response_length/mean", "entropy": "actor/entropy", "clipfrac": "actor/pg_clipfrac"}
TOTALS = {
    "anchor_backwards": "anchor/backwards",
    "comm/bytes_ratio": "comm/bytes_ratio",
    "comm/total_ratio": "comm/total_ratio",
}


def write_csv(runs: list[Run], out: Path) -> None:
    """One row a run: name, seed, learning rate, status, accuracy at each validation, ends, totals, seconds."""
    rows = [_row(run) for run in runs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    vals = sorted((c for c in columns if c.startswith("val@")), key=lambda c: int(c[4:]))
    columns = [c for c in columns if c not in vals]
    at = columns.index("steps") + 1 if rows else 0
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns[:at] + vals + columns[at:], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, out)


def _row(run: Run) -> dict[str, Any]:
    grpo = run.settings.get("grpo", {})
    row = {"run": run.name, "seed": run.seed, "lr": grpo.get("lr"), "status": run.status, "steps": run.steps}
    row |= {f"val@{step:g}": _short(value) for step, value in run.series("val", "step", "accuracy").items()}
    for name, metric in AT_END.items():
        values = list(run.series("step", "step", metric).values())[-LAST:]
        row[f"{name}_end"] = _short(np.mean(values)) if values else None
    row |= {name.removeprefix("comm/"): _short(run.last(name, recorded)) for name, recorded in TOTALS.items()}
    return row | {"wall_s": _short(run.summary.get("wall_s"))}


def _short(value: Any) -> str | None:
    return None if value is None else f"{float(value):.5g}"
