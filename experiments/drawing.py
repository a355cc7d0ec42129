"""How a figure becomes SVG that stands inside an HTML page, legible on light and on dark ground.

No script, no font file, no background. What belongs to a page rather than to a picture (title, legend,
explanation) is the template's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

GREY = "#7a7a7a"
STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's own font, selectable, and small
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": GREY,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


class Picture(NamedTuple):
    """A finished figure and the words around it."""

    title: str
    note: str
    svg: Markup


def in_bytes(value: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * limit:  # 999.6 kB would be written 1e+03 kB
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def as_svg(key: str, draw: Callable[[Figure], None], height: float, width: float = 4.6) -> Markup:
    """The drawing as an <svg> element that names no address and shares no id with another one."""
    text = io.StringIO()
    style: dict[Any, Any] = STYLE | {"svg.hashsalt": key}  # rcParams, whose names matplotlib types as literals
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg))
