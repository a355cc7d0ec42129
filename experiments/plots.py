"""The report's lines: what a run recorded, over its ticks and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.drawing import Picture, as_svg
from experiments.runs import Run, pool
from experiments.stats import ignition

# At least 3:1 against white and against the page's dark ground; no two alike in the common colour blindnesses
PALETTE = ("#0072b2", "#d55e00", "#8b20f4", "#8d8f55", "#90556c", "#00897b")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}


class Plot(NamedTuple):
    """A figure of lines. `panels` are (label of the y axis, metric), one above the other. With `marks`, every
    curve has a picture of its own, and open markers where that metric is not 0. With `ignites`, a dotted line
    stands where a run has left its baseline for good (`experiments.stats.ignition`)."""

    title: str
    kind: str
    x: str
    panels: tuple[tuple[str, str], ...]
    note: str = ""
    marks: str = ""
    ignites: bool = False


CORRECTION = "In ticks. Lag: how old the weights behind the correction are; age: for how long it has been merged."
SAMPLES = "Mean over the step's samples."
REFRESHED = "Open markers: ticks that refreshed Q."
IGNITED = "Dotted: from here on, a run stays above its own early baseline."
TRUTH = "Cosine with the dense gradient of the tick's own weights and batch; before clipping."
ERRORS = (
    "M of the source against the dense gradient, relative to it: all, from old weights, from other samples, and what "
    "two independent batches at equal weights would differ by."
)
SHARES = (
    "w: of the correction in the step. f: how far the signs of the compressed gradient agree with those of M, of the same samples; "
    "a: those of two M."
)
GAINS = "First-order change of mean reward and of mean length by the tick's update, judged on the tick's own samples."
PLOTS = (
    Plot("Validation accuracy", "val", "step", (("accuracy", "accuracy"),)),
    Plot("Reward", "step", "step", (("mean reward", "critic/rewards/mean"),), SAMPLES),
    Plot("Response length", "step", "step", (("tokens", "response_length/mean"),), SAMPLES, ignites=True),
    Plot("Entropy", "step", "step", (("nats a token", "actor/entropy"),), ignites=True),
    Plot("Lag and age", "tick", "tick", (("lag", "anchor/lag"), ("age", "anchor/age")), CORRECTION),
    Plot(
        "Share of the correction",
        "tick",
        "tick",
        (("w", "merger/w"), ("f", "merger/f"), ("a", "merger/a")),
        SHARES,
    ),
    Plot("Clipped share", "tick", "tick", (("pg_clipfrac", "actor/pg_clipfrac"),), REFRESHED, "codec/q_refreshed"),
    Plot(
        "Agreement with the true gradient",
        "tick",
        "tick",
        (("M̄", "diagnostics/cos_m_bar"), ("G_comp", "diagnostics/cos_g_comp"), ("merged", "diagnostics/cos_merged")),
        TRUTH,
    ),
    Plot(
        "Error of the correction",
        "tick",
        "tick",
        tuple((name, f"diagnostics/error_{name}") for name in ("total", "drift", "shift", "noise")),
        ERRORS,
    ),
    Plot(
        "Predicted gain of an update",
        "tick",
        "tick",
        (("reward", "diagnostics/gain_reward"), ("tokens", "diagnostics/gain_length")),
        GAINS,
    ),
)


@dataclass(frozen=True)
class Curve:
    """One line of every figure: a run, or the completed seeds of one experiment drawn as mean and band."""

    runs: tuple[Run, ...]
    label: str
    color: str
    marker: str
    stopped: bool

    @property
    def pooled(self) -> bool:
        return len(self.runs) > 1

    @property
    def has_data(self) -> bool:
        return any(_values(self, plot, metric) for plot in PLOTS for _, metric in plot.panels)

    @property
    def glyph(self) -> str:
        return MARKERS[self.marker]


def curves(runs: list[Run]) -> list[Curve]:
    """The lines of every figure, each experiment in a colour of its own."""
    groups = pool(runs)
    designs = list(dict.fromkeys(run.design for run in runs))
    labels = [_label(group) for group in groups]
    found = []
    for group, label in zip(groups, labels):
        index = designs.index(group[0].design)
        if labels.count(label) > 1:
            label += f" ({group[0].folder.name})"
        marker = list(MARKERS)[index % len(MARKERS)]
        stopped = group[0].status != "completed"
        found.append(Curve(tuple(group), label, PALETTE[index % len(PALETTE)], marker, stopped))
    return found


def _label(group: list[Run]) -> str:
    first = group[0]
    if len(group) > 1:
        return f"{first.name}, {len(group)} seeds"
    return f"{first.name}, seed {first.seed}" + ("" if first.status == "completed" else f", {first.status}")


def together(found: list[Curve]) -> list[list[Curve]]:
    """Those that share pictures: neighbours, no more than there are colours, in parts of about one size."""
    parts = math.ceil(len(found) / len(PALETTE))
    return [list(part) for part in np.array_split(np.array(found, dtype=object), parts)] if found else []


def lines(group: list[Curve], beside: list[Curve]) -> list[Picture]:
    """The pictures of all `PLOTS` for which the group has any data, with only the panels for which it has.

    Axes are wide enough for the curves of `beside` too, so that the pictures of groups can be compared.
    """
    pictures = []
    for plot in PLOTS:
        panels = tuple(panel for panel in plot.panels if any(_values(curve, plot, panel[1]) for curve in group))
        drawn = [curve for curve in group if any(_values(curve, plot, metric) for _, metric in panels)]
        for shown in [[curve] for curve in drawn] if plot.marks else [drawn] * bool(drawn):
            pictures.append(_picture(plot._replace(panels=panels), shown, beside))
    return pictures


def _picture(plot: Plot, group: list[Curve], beside: list[Curve]) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(plot.panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (label, metric) in zip(axes, plot.panels):
            series = [values for curve in beside for values in _values(curve, plot, metric)]
            axis.update_datalim([point for values in series for point in values.items()])
            for curve in group:
                _draw(axis, curve, plot, metric)
            for curve, step in _ignitions(group, plot, metric):
                axis.axvline(step, color=curve.color, linestyle=":", linewidth=1.2)
            axis.set_ylabel(label)
            axis.margins(x=0.02)
        axes[-1].set_xlabel(plot.x)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))

    title = f"{plot.title}: {group[0].label}" if plot.marks and len(beside) > 1 else plot.title
    marked = not plot.marks or any(any(s.values()) for s in _values(group[0], plot, plot.marks))
    ignited = any(_ignitions(group, plot, metric) for _, metric in plot.panels)
    note = " ".join([plot.note] * bool(plot.note and marked) + [IGNITED] * ignited)
    key = " ".join([plot.title, *(curve.label for curve in group)])
    return Picture(title, note, as_svg(key, draw, 2.5 + 0.8 * (len(plot.panels) - 1)))


def _values(curve: Curve, plot: Plot, metric: str) -> list[dict[float, float]]:
    return [series for run in curve.runs if (series := run.series(plot.kind, plot.x, metric))]


def _ignitions(group: list[Curve], plot: Plot, metric: str) -> list[tuple[Curve, float]]:
    found = [(c, ignition(series)) for c in group for series in _values(c, plot, metric)] if plot.ignites else []
    return [(curve, step) for curve, step in found if step is not None]


def _draw(axis: Axes, curve: Curve, plot: Plot, metric: str) -> None:
    found = _values(curve, plot, metric)
    # Steps that all seeds have: a mean over changing company would move for that reason alone
    xs = sorted(set.intersection(*map(set, found))) if found else []
    if not xs:
        return
    values = np.array([[series[x] for x in xs] for series in found], dtype=float)
    values[~np.isfinite(values)] = np.nan
    mean = values.mean(axis=0)
    if len(found) > 1:
        axis.fill_between(xs, values.min(axis=0), values.max(axis=0), color=curve.color, alpha=0.25, linewidth=0)
    style: dict[str, Any] = {"color": curve.color, "linestyle": "--" if curve.stopped else "-", "marker": curve.marker}
    if plot.marks:
        marked = curve.runs[0].series(plot.kind, plot.x, plot.marks)
        style |= {"markevery": [i for i, x in enumerate(xs) if marked.get(x)], "markersize": 6, "fillstyle": "none"}
    else:
        style |= {"markevery": max(1, len(xs) // 8), "markersize": 4 if plot.x == "step" else 0}
    axis.plot(xs, mean, **style)
