"""Whether the anchor was worth its bytes: of a run, by what it merged; of a sweep, by the arms that had none.

A held correction is one noisy pattern of signs for as long as it is held. How large a share w of the step it may be is
bounded by that: w ≤ cap/τ, with cap = `merger.cap`, τ = C(1+β)/(1-β) for a mean hold of C ticks and β = `anchor.beta_anc`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from codec.ledger import ANCHOR
from experiments.cells import Cell, Findings
from experiments.drawing import in_bytes
from experiments.runs import Run
from experiments.spending import EVERYTHING, traffic_of
from experiments.stats import LEAST_SEEDS, Estimate, paired
from experiments.sweep import flat
from experiments.words import Number, Sentence, interval

FARTHER = 1.5  # times the learning rate, from where on it is said: rates of a grid are twice one another
SLACK = 1e-3  # relative: a share that was set to the bound is within it
APART = ("run.", "merger.", "links.", "diagnostics.")  # settings that arms of one codec may differ in


class AnchorBytes(NamedTuple):
    """Over a whole run."""

    anchor: float
    everything: float

    def __str__(self) -> str:
        share = 100 * self.anchor / self.everything
        return f"{in_bytes(self.anchor)} of {in_bytes(self.everything)} ({share:.0f}\N{NO-BREAK SPACE}%)"


def spent_on_anchor(runs: Collection[Run]) -> AnchorBytes | None:
    """Means over the runs; None if no anchor was sent anything."""
    found = [traffic for run in runs if (traffic := traffic_of(run))]
    spent = [sum(t[channel].sent for channel in ANCHOR if channel in t) for t in found]
    if not any(spent):
        return None
    return AnchorBytes(float(np.mean(spent)), float(np.mean([t[EVERYTHING].sent for t in found])))


# --- a run -----------------------------------------------------------------------------------------


def anchor_in_words(run: Run) -> str | None:
    """`4 MB of 13.4 MB (30 %); a share of 0.05 of the step, within the bound 0.26 …`; None for a run without an anchor."""
    spent = spent_on_anchor([run])
    if spent is None:
        return None
    if not (merged := _series(run, "merger/w") or _series(run, "merger/dose")):
        return f"{spent}; nothing was merged"
    share, settings = _share(run), flat(run.settings)
    if share is None:
        return str(spent)
    full = _full_share(settings) if settings.get("merger.kind") == "calibrated" else None
    return f"{spent}; {share_in_words(share, _bound(run, merged), full, settings.get('merger.cap', 12.0))}"


def share_in_words(share: float, bound: float, full: float | None, cap: float) -> str:
    """`full`: what a calibrated share would be without the calibration. `bound` is `cap`/τ.

    A sign that is held for τ ticks goes as far as fresh noise of √τ times its size, so the step's noise as far as at a
    learning rate √(1 + w²τ) times as high.
    """
    over = f"beyond the bound {bound:.2g} that its hold allows: it may do harm"
    allowed = over if share > bound * (1 + SLACK) else f"within the bound {bound:.2g} that its hold allows"
    said = f"a share of {share:.2g} of the step, {allowed}"
    if full is not None and full > bound * (1 + SLACK):
        said += f"; it would be {full:.2g}, beyond the bound, without the calibration"
    farther = math.sqrt(1 + share**2 * cap / bound)
    return said if farther < FARTHER else f"{said}; its noise goes as far as at {farther:.2g} times the learning rate"


def _share(run: Run) -> float | None:
    """Mean share w of the correction in what it was merged into; None for a merger that has no such share."""
    if shares := _series(run, "merger/w"):
        return float(np.mean(list(shares.values())))
    settings = flat(run.settings)
    if settings.get("merger.kind", "signed_ema") != "signed_ema":
        return None
    return float(np.mean(list(_series(run, "merger/dose").values()))) * (1 - settings.get("merger.alpha", 0.25))


def _full_share(settings: dict[str, Any]) -> float:
    """That of signed_ema under the same settings, in a tick that first merges a correction."""
    return settings.get("merger.dose", 1.0) * (1 - settings.get("merger.alpha", 0.25))


def _bound(run: Run, merged: Collection[float]) -> float:
    """cap/τ, with the τ that the merger kept or, where it keeps none, that of the holds in the run's record."""
    settings = flat(run.settings)
    cap, beta = settings.get("merger.cap", 12.0), settings.get("anchor.beta_anc", 0.5)
    if kept := [tau for tau in _series(run, "merger/tau").values() if tau > 0]:
        return float(np.mean(cap / np.array(kept)))
    return cap / (_hold(run, merged) * (1 + beta) / (1 - beta))


def _hold(run: Run, merged: Collection[float]) -> float:
    """Mean ticks for which a correction was merged, over those that were followed by another one."""
    ages = run.series("tick", "tick", "anchor/age")
    starts = [tick for tick in merged if ages.get(tick) == 0]
    if len(starts) < 2:
        return len(merged)
    return sum(starts[0] <= tick < starts[-1] for tick in merged) / (len(starts) - 1)


def _series(run: Run, metric: str) -> dict[float, float]:
    """By tick, what is finite."""
    return {tick: value for tick, value in run.series("tick", "tick", metric).items() if math.isfinite(value)}


# --- a sweep ---------------------------------------------------------------------------------------


class Gain(NamedTuple):
    """What an arm's anchor changed, within a seed, against the same codec without one."""

    cell: Cell
    found: Estimate
    spent: AnchorBytes

    @property
    def sign(self) -> int:
        """Of a gain that can be told from nothing; 0 of one that cannot."""
        return 0 if not self.found.distinguishable else 1 if self.found.mean > 0 else -1


def anchor_gains(findings: Findings) -> list[Gain]:
    """Of the arms with an anchor that have one without to be compared with, each at its own best point."""
    cells = [cell for cell in findings.tuned.values() if cell.completed]
    spent = {cell.arm: spent_on_anchor(cell.completed) for cell in cells}
    without = [cell for cell in cells if spent[cell.arm] is None and _kind(cell) == "none"]
    base = {_same(findings, cell, "anchor."): cell for cell in reversed(without)}  # of several the first
    gains = [
        Gain(cell, paired(cell.values, other.values), cost)
        for cell in cells
        if (cost := spent[cell.arm]) and (other := base.get(_same(findings, cell, "anchor.")))
    ]
    return [gain for gain in gains if gain.found.n]


def worth_in_words(findings: Findings) -> list[Sentence]:
    """Three sentences at most: where the anchor was worth its bytes, made no difference, did harm."""
    gains = anchor_gains(findings)
    harmful = {_same(findings, g.cell) for g in gains if _kind(g.cell) == "signed_ema" and g.sign < 0}
    spared = {
        g.cell.arm
        for g in gains
        if _kind(g.cell) == "calibrated" and g.sign >= 0 and _same(findings, g.cell) in harmful
    }
    says = {
        1: "The anchor was worth its bytes (gain over the same codec without one, each at its best):",
        0: f"The anchor made no difference that can be told (the interval holds 0, or fewer than {LEAST_SEEDS} seeds):",
        -1: "The anchor was harmful:",
    }
    return [
        _listed(says[s], [g for g in gains if g.sign == s], spared) for s in says if any(g.sign == s for g in gains)
    ]


def _listed(first: str, gains: list[Gain], spared: set[str]) -> Sentence:
    parts: list[str | Number] = [f"{first} "]
    for gain in gains:
        but = ", harmful without the calibration" if gain.cell.arm in spared else ""
        parts += [f"{gain.cell.arm} ", Number(f"{interval(gain.found)} for {gain.spent}", gain.cell.name), but, "; "]
    return Sentence((*parts[:-1], "."), gains[0].sign > 0)


def _kind(cell: Cell) -> Any:
    return flat(cell.completed[0].settings).get("merger.kind")


def _same(findings: Findings, cell: Cell, *apart: str) -> str:
    """What arms that are compared share: all settings but those of the merger, of the grid, and `apart`."""
    settings = flat(cell.completed[0].settings)
    if settings.get("codec.kind") != "none":  # where it says nothing, tables are renewed at the anchor's cadence
        settings["codec.q_cadence"] = settings.get("codec.q_cadence") or settings.get("anchor.cadence")
    kept = [(k, v) for k, v in settings.items() if k not in findings.sweep.axes and not k.startswith((*APART, *apart))]
    return str(sorted((k, str(v)) for k, v in kept))
