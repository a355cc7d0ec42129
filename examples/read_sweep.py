"""A sweep, read by a script of your own: a table of its cells, means over their seeds.

    .venv/bin/northstar sweep lag-curve --set run.steps=10 --out runs/lag-curve-short
    .venv/bin/python examples/read_sweep.py runs/lag-curve-short

A sweep's folder holds `sweep.toml`, and for each run `CELL/seed-N/` with `config.toml`, `metrics.jsonl` and `summary.json`. `experiments` reads
them, also of runs that were killed or still run; a run is `run.settings` (its config), `run.records` (`metrics.jsonl`), `run.summary`, and
`run.series("step", "step", "response_length/mean")` is any metric over steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from experiments.cells import is_sweep, load_sweep
from experiments.runs import Run


def last_of(run: Run, kind: str, metric: str) -> float | None:
    """What a run recorded last."""
    return next(reversed(run.series(kind, "step", metric).values()), None)


def mean(values: Iterable[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{fmean(there):.4f}" if there else "–"


def main(folder: Path) -> None:
    if not is_sweep(folder):
        sys.exit(f"{folder} is no sweep's folder: give what `northstar sweep … --out` wrote")
    print(f"{'cell':32} {'runs':>4} {'accuracy':>9} {'tokens':>8} {'total_ratio':>11}")
    for cell in load_sweep(folder).cells:
        runs = cell.completed
        accuracy = mean(last_of(run, "val", "accuracy") for run in runs)
        tokens = mean(last_of(run, "step", "response_length/mean") for run in runs)
        ratio = mean(run.total_ratio for run in runs)
        print(f"{cell.name:32} {len(runs):4} {accuracy:>9} {tokens:>8} {ratio:>11}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of a sweep, for example runs/lag-curve-short")
    main(Path(sys.argv[1]))
