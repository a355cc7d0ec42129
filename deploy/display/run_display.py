"""What a user sees of a run: a live progress line, one line a validation, a table at the end."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from anchor_service.errors import described
from codec.ledger import CHANNELS
from swarm.run_config import RunConfig

console = Console()
FACTS = {  # of a step: its metric and its format
    "tick": ("tick", "d"),
    "reward": ("critic/rewards/mean", ".3f"),
    "length": ("response_length/mean", ".1f"),
    "val": ("", ".3f"),
    "lag": ("", "g"),
    "total": ("comm/total_ratio", ".4f"),
    "bytes": ("comm/bytes_ratio", ".4f"),
}


class RunDisplay:
    """Listener of the telemetry. On a terminal a live line, elsewhere a plain line every few steps."""

    def __init__(self, config: RunConfig, folder: Path):
        self.config, self.folder = config, folder
        self.lag = self.age = self.accuracy = None
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("[bold]{task.fields[phase]}"),
            BarColumn(bar_width=20),
            TextColumn("step {task.completed:g}/{task.total:g} {task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task("run", total=config.run.steps, phase="starting", facts="")

    def __enter__(self) -> RunDisplay:
        with harmless("the display did not start"):
            self._start()
        return self

    def _start(self) -> None:
        c = self.config
        anchor = f"anchor K={c.anchor.delay_k}/{c.anchor.cadence}" if c.anchor.enabled else "no anchor"
        console.print(
            f"[bold]{c.run.name}[/] seed {c.run.seed}: {c.model.path} on {c.task.name}, "
            f"dp={c.swarm.dp} pp={c.swarm.pp}, codec {c.codec.kind}, {anchor}, "
            f"merger {c.merger.kind}{f', placebo {c.merger.placebo}' if c.merger.placebo else ''}"
        )
        console.print(f"run folder {self.folder}; starting Ray and the actors …")
        self.progress.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with harmless("the display did not end well"):
            self.progress.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "tick":
            self.lag, self.age = record.get("anchor/lag"), record.get("anchor/age")
        elif kind == "val":
            self.accuracy = record.get("accuracy")
            others = "".join(f"  {name} {value:.3f}" for name, value in record.get("sets", {}).items())
            accuracy = _figure(self.accuracy, ".3f")
            console.print(
                f"step {record['step']:4d}  validation accuracy {accuracy}{others}", markup=False, soft_wrap=True
            )
        elif kind == "restored":
            self.accuracy = record.get("accuracy")
            self.progress.update(self.task, completed=record["step"])
            console.print(f"step {record['step']:4d}  goes on from here, accuracy {_figure(self.accuracy, '.3f')}")
        elif kind == "step":
            self._step(record)
        elif kind == "event":
            reason = f": {record['reason']}" if "reason" in record else ""
            console.print(f"step {record['step']:4d}  {record['event']}{reason}", markup=False, soft_wrap=True)

    def _step(self, record: dict[str, Any]) -> None:
        shown = {name: _figure(record.get(key), form) for name, (key, form) in FACTS.items()}
        shown |= {"val": _figure(self.accuracy, ".3f"), "lag": _figure(self.lag, "g")}
        facts = "  ".join(f"{name} {figure}" for name, figure in shown.items())
        self.progress.update(self.task, completed=record["step"], phase="training", facts=facts)
        if not self.live and (record["step"] % 5 == 0 or record["step"] == 1):
            console.print(f"step {record['step']:4d}  {facts}", soft_wrap=True)


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The table at the end of a run."""
    from experiments.anchor_worth import anchor_in_words  # with matplotlib, which takes a second to import
    from experiments.runs import load_run

    table = Table(title=f"{summary['name']}: {summary['status']}", show_header=False)
    validations: list[dict[str, Any]] = summary["validations"]
    table.add_row("validation accuracy", "  ".join(f"@{v['step']} {v['accuracy']:.3f}" for v in validations) or "–")
    for name in dict.fromkeys(name for v in validations for name in v.get("sets", {})):
        series = [(v["step"], v["sets"][name]) for v in validations if name in v.get("sets", {})]
        table.add_row(f"  {escape(name)}", "  ".join(f"@{step} {accuracy:.3f}" for step, accuracy in series))
    table.add_row("steps, ticks, anchor backwards", "{steps}, {ticks}, {anchor_backwards}".format_map(_zeros(summary)))
    for name, value in _bytes(summary):
        table.add_row(name, value)
    if anchor := anchor_in_words(load_run(folder)):
        table.add_row("anchor", anchor)
    seconds = {name.removeprefix("timing_s/"): s for name, s in summary["seconds"].items()}
    phases = dict.fromkeys(["step", *seconds])
    table.add_row("seconds by phase", "  ".join(f"{phase} {seconds.get(phase, 0):.1f}" for phase in phases))
    peaks = summary.get("peak_memory_gb", {})
    table.add_row("peak memory of a process", "  ".join(f"{role} {gb:.2f} GB" for role, gb in peaks.items()) or "–")
    table.add_row("wall seconds with start-up", f"{summary['wall_s']:.1f}")
    console.print(table)
    console.print(f"run folder {folder}")
    if (folder / "checkpoints").is_dir():
        console.print(f"the policy as a Hugging Face folder: northstar export {folder} DIR", soft_wrap=True)


def _bytes(summary: dict[str, Any]) -> Generator[tuple[str, str]]:
    """Everything first, as that is what a user's links carry; then where it went."""
    channels: dict[str, dict[str, float]] = summary.get("bytes", {})
    if summary.get("comm/total_ratio") is not None:
        whole = _of_dense(*(sum(entry[side] for entry in channels.values()) for side in ("sent", "dense")))
        yield "total_ratio (everything)", f"{summary['comm/total_ratio']:.4f}  {whole}"
        yield "bytes_ratio (published definition)", f"{summary.get('comm/bytes_ratio') or 1:.4f}"
    for channel in CHANNELS:
        if channel in channels:
            yield f"bytes {channel}", _of_dense(channels[channel]["sent"], channels[channel]["dense"])


def _of_dense(sent: float, dense: float) -> str:
    return f"{sent / 1e6:,.2f} MB  (dense {dense / 1e6:,.2f} MB)"


@contextmanager
def harmless(failure: str) -> Generator[None]:
    """What is only shown or written for people must not change how a run is said to have ended."""
    try:
        yield
    except (Exception, SystemExit) as error:  # SystemExit: rich, when its output is gone
        typer.secho(f"{failure}: {described(error)}", fg="yellow", err=True)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _zeros(summary: dict[str, Any]) -> dict[str, Any]:
    return {"steps": 0, "ticks": 0, "anchor_backwards": 0} | summary
