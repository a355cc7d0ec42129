"""Run folders, read back: what a run left, however it ended, and which runs are seeds of one experiment."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard


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

    @property
    def total_ratio(self) -> float | None:
        """All bytes over all that a dense system sends, so far."""
        value = self.last("comm/total_ratio", "comm/total_ratio")
        return value if _is_number(value) else None

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
        return text(done) if planned == done else f"{text(done)} of {text(planned)}"

    @property
    def accuracy(self) -> str:
        """First and last validation, as `0.367 → 0.379`."""
        values = list(self.series("val", "step", "accuracy").values()) or [None]
        start, end = self.summary.get("val_start", values[0]), self.summary.get("val_end", values[-1])
        return f"{text(start, '.3f')} → {text(end, '.3f')}" if _is_number(start) else "–"


def load_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders. A folder that is no run itself stands for the runs right below it, or for the
    cells of a sweep that are."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give the folders of runs, or one that holds them")
        below = sorted(path for depth in ("*", "*/seed-*") for path in folder.glob(depth) if _is_run(path))
        found += below if below and not _is_run(folder) else [folder]
    return [load_run(folder) for folder in dict.fromkeys(path.resolve() for path in found)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", "summary.json"))


def load_run(folder: Path) -> Run:
    """One run folder, whatever is in it."""
    lines = _read(folder / "metrics.jsonl").splitlines()
    records = [record for line in lines if (record := _object(line))]
    written = _read(folder / "summary.json")
    summary = _object(written)
    notes = [str(summary["error"])] if summary.get("error") else []
    if not summary:
        notes += ["summary.json cannot be read" if written else "no summary.json: still running, or killed"]
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


def _object(line: str) -> dict[str, Any]:
    """The JSON object in `line`, or an empty one: the last line of a killed run may be cut."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def pool(runs: list[Run]) -> list[list[Run]]:
    """Group runs into lines. Only completed runs that differ in nothing but the seed come together.

    A run that stopped early stays alone: in a mean, its end would look like a jump.
    """
    groups: list[list[Run]] = []
    for run in runs:
        home = next((group for group in groups if _belongs(run, group)), None)
        groups.append([run]) if home is None else home.append(run)
    return groups


def _belongs(run: Run, group: list[Run]) -> bool:
    same = run.design == group[0].design and run.seed not in {other.seed for other in group}
    return same and run.status == group[0].status == "completed"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: Any, spec: str = "g") -> str:
    """A number as a reader sees it; a dash for one that is not there."""
    return format(value, spec) if _is_number(value) and not math.isnan(value) else "–"
