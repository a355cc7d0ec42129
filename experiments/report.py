"""`northstar report`: one self-contained page, and one Markdown table, about one or more run folders.

Everything shown was written down by the run itself. A figure for which no run has data is left out,
and a run that stopped early is shown as far as it came, under its own label.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from experiments import plots

Column = tuple[str, Callable[["Run"], str]]


@dataclass(frozen=True)
class Run:
    """One run folder as found: parts that are missing or cut short are empty, and `notes` tell so."""

    folder: Path
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    config: str
    notes: tuple[str, ...]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved config; empty where it is not valid TOML, as its text is shown in any case."""
        try:
            return tomllib.loads(self.config)
        except tomllib.TOMLDecodeError:
            return {}

    @property
    def name(self) -> str:
        return str(self._identity("name", self.folder.name))

    @property
    def seed(self) -> str:
        return str(self._identity("seed", "–"))

    @property
    def status(self) -> str:
        """A run writes its status last, so one that has none still runs or was killed."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def design(self) -> str:
        """What two runs must share to be seeds of one experiment: the name and every setting but the seed."""
        settings = {k: v for k, v in self.settings.items() if k != "run"}
        section = {k: v for k, v in self._section().items() if k != "seed"}
        return json.dumps([self.name, settings, section], sort_keys=True, default=str)

    def series(self, kind: str, x: str, metric: str) -> dict[float, float]:
        """{x: value} of a metric in the records of one kind; NaN stays, as a gap in the line."""
        pairs = ((r.get(x), r.get(metric)) for r in self.records if r.get("kind") == kind)
        return {at: value for at, value in pairs if _is_number(at) and _is_number(value)}

    def last(self, name: str, recorded_as: str) -> Any:
        """A total from the summary or, as a killed run has none, the last one that a tick recorded."""
        recorded = self.series("tick", "tick", recorded_as).values()
        return self.summary.get(name, next(reversed(recorded), None))

    def _identity(self, key: str, default: str) -> Any:
        return self.summary.get(key, self._section().get(key, default))

    def _section(self) -> dict[str, Any]:
        section = self.settings.get("run")
        return section if isinstance(section, dict) else {}

    @property
    def steps(self) -> str:
        """`12 of 100` where the config asked for more steps than were made."""
        done = self.summary.get("steps", max(self.series("step", "step", "step"), default=0))
        planned = self._section().get("steps", done)
        return _text(done) if planned == done else f"{_text(done)} of {_text(planned)}"

    @property
    def accuracy(self) -> str:
        """First and last validation, as `0.367 → 0.379`."""
        values = list(self.series("val", "step", "accuracy").values()) or [None]
        start, end = self.summary.get("val_start", values[0]), self.summary.get("val_end", values[-1])
        return f"{_text(start, '.3f')} → {_text(end, '.3f')}" if _is_number(start) else "–"


COLUMNS: tuple[Column, ...] = (
    ("run", lambda run: run.name),
    ("seed", lambda run: run.seed),
    ("status", lambda run: run.status),
    ("validation accuracy", lambda run: run.accuracy),
    ("steps", lambda run: run.steps),
    ("anchor backwards", lambda run: _text(run.last("anchor_backwards", "anchor/backwards"))),
    ("bytes_ratio", lambda run: _text(run.last("comm/bytes_ratio", "comm/bytes_ratio"), ".4f")),
    ("total_ratio", lambda run: _text(run.last("comm/total_ratio", "comm/total_ratio"), ".4f")),
    ("wall seconds", lambda run: _text(run.summary.get("wall_s"), ".1f")),
)


def write_html(folders: list[Path], out: Path) -> None:
    """Write the page about the runs in `folders` to `out`. Raises FileNotFoundError for a folder that is not there."""
    runs = load_runs(folders)
    curves = plots.curves(runs)
    page = _template().render(
        title=", ".join(dict.fromkeys(run.name for run in runs)),
        headline=_headline(runs),
        runs=runs,
        columns=[heading for heading, _ in COLUMNS],
        rows=[(run, [cell(run) for _, cell in COLUMNS]) for run in runs],
        curves=[curve for curve in curves if curve.has_data],
        figures=plots.lines(curves),
        bars=plots.bars(curves),
        sent=plots.SENT,
        dense=plots.DENSE,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that a page that someone has open is never half a page
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, out)


def markdown(folders: list[Path]) -> str:
    """The table of runs, for a terminal or a results file; notes on single runs follow it."""
    runs = load_runs(folders)
    lines = [[heading for heading, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[_cell(cell(run)) for _, cell in COLUMNS] for run in runs]
    notes = [f"- {_cell(run.name)}, seed {_cell(run.seed)}: {_cell(note)}" for run in runs for note in run.notes]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "".join(f"\n{note}" for note in notes) + ("\n" if notes else "")


def load_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders. A folder that is no run itself stands for the runs right below it."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give the folders of runs, or one that holds them")
        below = sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
        found += below if below and not _is_run(folder) else [folder]
    return [_load(folder) for folder in dict.fromkeys(path.resolve() for path in found)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", "summary.json"))


def _load(folder: Path) -> Run:
    lines = _read(folder / "metrics.jsonl").splitlines()
    records = [record for line in lines if (record := _object(line))]
    text = _read(folder / "summary.json")
    summary = _object(text)
    notes = [str(summary["error"])] if summary.get("error") else []
    if not summary:
        notes += ["summary.json cannot be read" if text else "no summary.json: still running, or killed"]
    if len(records) < len(lines):
        notes += [f"lines of metrics.jsonl that cannot be read, left out: {len(lines) - len(records)}"]
    starts = [r for r in records if r.get("event") == "started"]
    notes += [f"resumed at step {r.get('step')}: wall seconds count from there" for r in starts[1:][-1:]]
    for record in records:
        if record.get("kind") == "val" and "accuracy" not in record:
            core = (v for k, v in record.items() if k.startswith("val-core/"))
            record["accuracy"] = next(core, None)
    return Run(folder, summary, records, _read(folder / "config.toml"), tuple(notes))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(text: str) -> dict[str, Any]:
    """The JSON object in `text`, or an empty one: the last line of a killed run may be cut."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _headline(runs: list[Run]) -> list[tuple[str, str]]:
    """What the top of the page says, as (text, status it is about)."""
    if len(runs) == 1:
        return [(runs[0].status, runs[0].status), (f"seed {runs[0].seed}", "")]
    statuses = [run.status for run in runs]
    counts = [(f"{statuses.count(status)} {status}", status) for status in dict.fromkeys(statuses)]
    return [(f"{len(runs)} runs", ""), *counts, (f"seeds {', '.join(dict.fromkeys(run.seed for run in runs))}", "")]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any, spec: str = "g") -> str:
    return format(value, spec) if _is_number(value) and not math.isnan(value) else "–"


def _cell(text: str) -> str:
    """Text that can neither end a Markdown table cell nor be taken for HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("experiments", ".")
    settings = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=loader, autoescape=True, **settings).get_template("report.html.j2")
