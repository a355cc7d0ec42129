"""What a simulated run came to, as numbers, as a table and as a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from anchor_service.lag import Due
from codec.ledger import CHANNELS, PUBLISHED

PARTS = ("swarm compute", "swarm links", "anchor compute", "anchor link", "engines")


@dataclass
class Simulation:
    """What a simulated run came to. Lags and ages are in ticks."""

    name: str
    workers: int
    ticks: int
    seconds: float = 0.0
    corrections: list[Due] = field(default_factory=list)
    started: int = 0
    lags: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    expired: int = 0  # ticks in which the correction held was beyond max_age
    tick_seconds: list[float] = field(default_factory=list)
    critical: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    swarm_utilisation: float = 0.0
    anchor_utilisation: float = 0.0
    bytes: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def bottleneck(self) -> str:
        return max(self.critical, key=self.critical.__getitem__)

    def summary(self) -> dict[str, Any]:
        """For simulation.json."""
        hours = self.seconds / 3600
        sent, dense = (sum(v[i] for v in self.bytes.values()) for i in (0, 1))
        published = [sum(self.bytes[c][i] for c in PUBLISHED) for i in (0, 1)]
        return {
            "name": self.name,
            "workers": self.workers,
            "ticks": self.ticks,
            "seconds": self.seconds,
            "ticks_per_hour": self.ticks / hours,
            "tick_seconds": _spread(self.tick_seconds),
            "fires_started": self.started,
            "corrections_merged": len(self.lags),
            "corrections_passed_over": sum(due.first_tick is None for due in self.corrections),
            "lag": _spread(self.lags),
            "age": _spread(self.ages),
            "ticks_expired": self.expired,
            "anchor_utilisation": self.anchor_utilisation,
            "swarm_utilisation": self.swarm_utilisation,
            "critical_share": {part: seconds / self.seconds for part, seconds in self.critical.items()},
            "bottleneck": self.bottleneck,
            "bytes_per_hour": {c: {"sent": s / hours, "dense": d / hours} for c, (s, d) in self.bytes.items()},
            "comm/bytes_ratio": published[0] / published[1] if published[1] else None,
            "comm/total_ratio": sent / dense if dense else None,
        }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {k: float(v) for k, v in dict(mean=np.mean(values), p50=p50, p90=p90, p99=p99, max=max(values)).items()}


def simulation_table(found: Simulation) -> Table:
    """The summary as a table."""
    facts = found.summary()
    rows = Table(title=f"{found.name}: {found.workers:,} workers, {found.ticks:,} ticks, simulated", show_header=False)
    rows.add_row("ticks an hour", f"{facts['ticks_per_hour']:,.1f}")
    rows.add_row("seconds a tick", _text(facts["tick_seconds"], ".3g"))
    rows.add_row("fires started, merged", f"{found.started}, {len(found.lags)}")
    rows.add_row("lag in ticks", _text(facts["lag"], ".3g"))
    rows.add_row("age in ticks", _text(facts["age"], ".3g"))
    rows.add_row("swarm utilisation", f"{found.swarm_utilisation:.1%}")
    rows.add_row("anchor utilisation", f"{found.anchor_utilisation:.1%}")
    for part, share in sorted(facts["critical_share"].items(), key=lambda item: -item[1]):
        rows.add_row(f"critical time: {part}", f"{share:.1%}" + ("  ◀ bottleneck" if part == found.bottleneck else ""))
    for channel in CHANNELS:
        entry = facts["bytes_per_hour"][channel]
        if entry["sent"] or entry["dense"]:
            rows.add_row(f"{channel} an hour", f"{_size(entry['sent'])}  (dense {_size(entry['dense'])})")
    rows.add_row("total_ratio (everything)", _ratio(facts["comm/total_ratio"]))
    rows.add_row("bytes_ratio (published definition)", _ratio(facts["comm/bytes_ratio"]))
    return rows


def write_simulation(found: Simulation, folder: Path) -> None:
    """simulation.json, corrections.csv (a trace for `anchor.lag`) and lag.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "simulation.json").write_text(json.dumps(found.summary(), indent=2) + "\n")
    with (folder / "corrections.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["version", "source_tick", "first_tick"])
        for due in found.corrections:
            rows.writerow([due.version, due.source_tick, "" if due.first_tick is None else due.first_tick])
    if found.lags:
        _plot(found, folder / "lag.png")


def _plot(found: Simulation, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    low, high = min(found.lags), max(found.lags)
    step = max(1, -(-(high - low + 1) // 40))  # whole ticks, at most 40 bars
    axes.hist(
        found.lags, bins=(np.arange(low, high + step + 1, step) - 0.5).tolist(), color="#0072b2", edgecolor="white"
    )
    axes.axvline(float(np.mean(found.lags)), color="#d55e00", label=f"mean {np.mean(found.lags):.1f}")
    axes.set(xlabel="lag in ticks", ylabel="corrections", title=f"{found.name}: {len(found.lags)} corrections")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _text(spread: dict[str, float] | None, form: str) -> str:
    return "–" if spread is None else "  ".join(f"{name} {value:{form}}" for name, value in spread.items())


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:,.1f} {unit}"
        nbytes /= 1000
    raise AssertionError
