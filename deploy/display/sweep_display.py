"""What a user sees of a sweep: a live table on a terminal, elsewhere a line a run; failures listed at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from deploy.cluster.sweep_runs import SweepRun
from deploy.display.run_display import console, harmless

_COLOURS = {"completed": "green", "failed": "red", "interrupted": "yellow", "running": "bold", "starting": "bold"}
_AROUND = 6  # finished and waiting runs shown on each side of the running ones


@dataclass
class _Row:
    run: SweepRun
    step: int = 0
    accuracy: float | None = None
    started: float | None = None
    seconds: float | None = None

    def cells(self) -> list[str]:
        took = self.seconds if self.seconds is not None else self.started and time.monotonic() - self.started
        colour = _COLOURS.get(self.run.state, "dim")
        return [
            self.run.job.name,
            str(self.run.job.seed),
            f"[{colour}]{self.run.state}[/]",
            f"{self.step}/{self.run.config.run.steps}" if self.started else "",
            "" if self.accuracy is None else f"{self.accuracy:.3f}",
            "" if took is None else f"{took:.0f}",
        ]


class SweepDisplay:
    """Watcher of a sweep."""

    def __init__(self, runs: list[SweepRun]):
        self.rows = {id(run): _Row(run) for run in runs}
        self.before = sum(run.state == "completed" for run in runs)
        self.live = Live(get_renderable=self._table, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> SweepDisplay:
        with harmless("the display did not start"):
            if self.before:
                console.print(f"{self.before} of {len(self.rows)} runs were completed before")
            if console.is_terminal:
                self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with harmless("the display did not end well"):
            self._end()

    def _end(self) -> None:
        if console.is_terminal:
            self.live.stop()
        failed = [row.run for row in self.rows.values() if row.run.error]
        for run in failed:
            console.print(f"[red]failed[/] {run.label}: {escape(run.error or '')}", soft_wrap=True)
        console.print(f"{self._done()} of {len(self.rows)} runs completed, {len(failed)} failed")

    def changed(self, run: SweepRun) -> None:
        row = self.rows[id(run)]
        if run.state == "starting":
            row.started = time.monotonic()
        else:
            row.seconds = time.monotonic() - (row.started or time.monotonic())
        if not console.is_terminal or run.state != "starting":
            name, seed, state, step, accuracy, seconds = row.cells()
            facts = f"step {step}  val {accuracy or '–'}  {seconds} s" if run.state != "starting" else ""
            console.print(f"{self._done():3d}/{len(self.rows)}  {name}  seed {seed}  {state}  {facts}", soft_wrap=True)

    def record(self, run: SweepRun, record: dict[str, Any]) -> None:
        row = self.rows[id(run)]
        row.step = record["step"]
        if record["kind"] == "val":
            row.accuracy = record.get("accuracy")

    def _done(self) -> int:
        return sum(row.run.state == "completed" for row in self.rows.values())

    def _table(self) -> Table:
        """The running runs and those around them: a sweep has more runs than a screen has lines."""
        rows = list(self.rows.values())
        active = [i for i, row in enumerate(rows) if row.run.state in ("starting", "running")] or [0]
        shown = rows[max(0, min(active) - _AROUND) : max(active) + _AROUND + 1]
        table = Table(
            "cell", "seed", "state", "step", "val", "seconds", title=f"{self._done()} of {len(rows)} completed"
        )
        for row in shown:
            table.add_row(*row.cells())
        return table
