"""A page in one file that needs no server, no network and no script.

Templates of a package extend `base.html.j2`, and take the parts that they share from
`parts.html.j2`. Every value is escaped; only plots are markup. The page's policy forbids every
load, so that it reads the same from a mail as from a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from report import formats

_FORMATS = {
    "number": formats.show_number,
    "percent": formats.show_percent,
    "bytes": formats.show_bytes,
    "count": formats.show_count,
    "time": formats.show_time,
    "duration": formats.show_duration,
    "estimate": formats.show_estimate,
    "percent_estimate": formats.show_percent_estimate,
    "time_estimate": formats.show_time_estimate,
}


def render_page(package: str, plots: Mapping[str, str], **values: Any) -> str:
    """Return the page of a package's `data/report.html.j2`; `plots` are `<svg>` elements by name.

    A value that the template names and nobody gave is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "data"), PackageLoader("report", "data")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(_FORMATS, plain=_plain)
    template = environment.get_template("report.html.j2")
    return template.render(plots={name: Markup(svg) for name, svg in plots.items()}, **values)


def _plain(value: object) -> str:
    """Write a setting without the marks of JSON."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
