"""A matplotlib figure as one inline `<svg>` element, and what all plots of the reports share.

The same values give the same bytes whatever the user's matplotlib settings. Colours are those of
Okabe and Ito, "Color Universal Design" (2008), which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
)  # fmt: skip
GREY = "#777777"
WIDTH_IN = 9.0
MIN_LOG_RANGE = 20.0  # values that differ by more are drawn on a logarithmic axis
MAX_LABELLED_RANGE = 200.0  # logarithmic axes of less have labels between the powers of ten
MAX_NAME_LETTERS = 40  # longer names would leave no room for the plot; tables have them whole
STYLE = {
    "svg.hashsalt": "tandem",
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "text.parse_math": False,  # a "$" in a name is a dollar
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "figure.dpi": 72,  # what SVG is written in, so that measured labels have their final size
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw_svg(name: str, height_in: float, paint: Callable[[Any], None]) -> str:
    """Return what `paint` draws on a figure; `name` sets its ids apart from other plots'."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser draws the text, with fonts of its own.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata=NO_METADATA)
    return inline_svg(target.getvalue(), name)


def inline_svg(document: str, name: str) -> str:
    """Return the `<svg>` element of an SVG document, its ids unique among all plots of a page."""
    element = document[document.index("<svg") :]
    element = re.sub(r' id="', f' id="{name}-', element)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", element)


def shorten(name: str) -> str:
    """Return a name that leaves room for the plot.

    >>> shorten("x" * 99) == "x" * 39 + "…"
    True
    """
    return name if len(name) <= MAX_NAME_LETTERS else f"{name[: MAX_NAME_LETTERS - 1]}…"


def scale_axis(axes: Any, name: Literal["x", "y"], values: Iterable[float]) -> None:
    """Make an axis logarithmic where its positive values differ by more than MIN_LOG_RANGE."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > MIN_LOG_RANGE * min(finite):
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        if max(finite) < MAX_LABELLED_RANGE * min(finite):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def move_to_free_place(
    text: Any, places: Iterable[tuple[float, float]], taken: list[Any], within: Any = None
) -> None:
    """Move `text` to the first offset that covers nothing, and add its box to `taken`."""
    for dx, dy in places:
        text.set_position((dx, dy))
        text.set_horizontalalignment("left" if dx > 0 else "right")
        box = text.get_window_extent()
        is_inside = within is None or (within.containsx(box.x0) and within.containsx(box.x1))
        if is_inside and not box.count_overlaps(taken):
            break
    taken.append(box)
