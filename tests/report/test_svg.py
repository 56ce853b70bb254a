from __future__ import annotations

import math
import re
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import pytest

from report.svg import (
    MAX_NAME_LETTERS,
    draw_svg,
    inline_svg,
    move_to_free_place,
    scale_axis,
    shorten,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def draw_line(figure: Any) -> None:
    figure.subplots().plot([1, 2], [3, 4], marker="o")


def draw_title(title: str) -> str:
    return draw_svg("title", 1.0, lambda figure: figure.suptitle(title))


def test_same_values_give_the_same_bytes_whatever_the_settings() -> None:
    expected = draw_svg("line", 1.0, draw_line)
    settings = {"lines.linewidth": 9, "font.size": 23, "svg.fonttype": "path", "axes.grid": False}
    with matplotlib.rc_context(settings):
        assert draw_svg("line", 1.0, draw_line) == expected
        assert matplotlib.rcParams["font.size"] == 23, "the user's settings are left as they were"


def test_ids_and_what_refers_to_them_are_prefixed_alike() -> None:
    document = '<?xml?><svg><g id="a"/><use href="#a"/><p style="clip: url(#a)"/></svg>'
    assert inline_svg(document, "one") == (
        '<svg><g id="one-a"/><use href="#one-a"/><p style="clip: url(#one-a)"/></svg>'
    )


def test_two_plots_of_a_page_share_no_id() -> None:
    one, two = (set(re.findall(r'\sid="([^"]*)"', draw_svg(name, 1.0, draw_line))) for name in "ab")
    assert one and not one & two


def test_names_are_text_and_never_markup_or_formulas() -> None:
    svg = draw_title("<script>$x^2$")
    assert "<script>" not in svg
    assert "<script>$x^2$" in texts(svg)


def test_name_in_any_script_is_kept() -> None:
    assert "教師 🎓" in texts(draw_title("教師 🎓"))


def test_long_name_is_cut() -> None:
    assert shorten("x" * MAX_NAME_LETTERS) == "x" * MAX_NAME_LETTERS
    assert shorten("y" * (MAX_NAME_LETTERS + 1)) == "y" * (MAX_NAME_LETTERS - 1) + "…"


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((0.011, 0.9), "log"),
        ((0.3, 0.9), "linear"),
        ((0.0, 0.9), "linear"),  # zero has no logarithm
        ((math.nan, math.inf), "linear"),
        ((), "linear"),
    ],
)
def test_wide_range_of_positive_values_gets_a_logarithmic_axis(
    name: Literal["x", "y"], values: tuple[float, ...], scale: str
) -> None:
    found = []

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        scale_axis(axes, name, values)
        found.append((axes.get_xscale(), axes.get_yscale()))

    draw_svg("scale", 1.0, paint)
    other = "linear"
    assert found == [(scale, other) if name == "x" else (other, scale)]


def test_label_goes_where_nothing_is_and_takes_that_place() -> None:
    taken: list[Any] = []

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for _ in range(2):
            text = axes.annotate("same", (0.5, 0.5), (0, 0), textcoords="offset points")
            move_to_free_place(text, [(8, 0), (8, 20), (8, 40)], taken)

    draw_svg("places", 2.0, paint)
    first, second = taken
    assert not first.overlaps(second)
    assert second.y0 - first.y0 == pytest.approx(20)
