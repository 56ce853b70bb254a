from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from export.publish.plots import (
    Candidate,
    Hop,
    Increment,
    LossTerm,
    PhaseCurves,
    RemovedLayer,
    draw_layer_ranking,
    draw_pass_rates,
    draw_phase,
    draw_tradeoff,
    draw_waterfall,
    measured_increments,
)
from tests.support.pages import SVG, texts_of

HOPS = (Hop("teacher", 0.0), Hop("pruned", 1.05), Hop("trained", 0.25), Hop("int8", 0.26))
CANDIDATES = (
    Candidate("fp32", 0.02, 0.30, is_passed=True, is_on_front=True, is_default=False),
    Candidate("int8", 0.01, 0.31, is_passed=True, is_on_front=True, is_default=True),
    Candidate("int4", 0.008, 0.9, is_passed=False, is_on_front=False, is_default=False),
)
PHASE = PhaseCurves(
    "soft KD",
    (1, 2, 3),
    (LossTerm("forward KL", (2.0, 1.5, 1.2)), LossTerm("hidden", (0.5, 0.4, 0.3), "mean square")),
    learning_rates=(1e-4, 2e-4, 1e-4),
    repetition=(0.1, 0.2, 0.3),
)
PLOTS: dict[str, Callable[[], str]] = {
    "waterfall": lambda: draw_waterfall(measured_increments(HOPS)),
    "pareto": lambda: draw_tradeoff(CANDIDATES, [("torch", 0.025), ("transformers", 0.03)]),
    "phase": lambda: draw_phase(PHASE, "phase0"),
    "layers": lambda: draw_layer_ranking([RemovedLayer(12, 0.08), RemovedLayer(3, 0.2)]),
    "pass_rates": lambda: draw_pass_rates([5, 0, 2, 9]),
}


@functools.cache
def drawn(name: str) -> str:
    return PLOTS[name]()


def place(svg: str, text: str) -> tuple[float, float]:
    """Return where a text is anchored, in points from the upper left."""
    element = text_element(svg, text)
    if "x" in element.attrib:
        return float(element.attrib["x"]), float(element.attrib["y"])
    numbers = re.search(r"translate\(([\d.-]+) ([\d.-]+)\)", element.attrib["transform"])
    assert numbers, element.attrib
    return float(numbers[1]), float(numbers[2])


def text_element(svg: str, text: str) -> ElementTree.Element:
    (element,) = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.text == text]
    return element


# --- of every plot


@pytest.mark.parametrize("name", PLOTS)
def test_plot_is_one_svg_element_that_loads_nothing(name: str) -> None:
    svg = drawn(name)
    assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
    assert svg.startswith("<svg")
    links = [
        value
        for element in ElementTree.fromstring(svg).iter()
        for key, value in element.attrib.items()
        if key.endswith("href")
    ]
    assert links, "marks and ticks are drawn by reference"
    assert all(link.startswith("#") for link in links)


@pytest.mark.parametrize("name", PLOTS)
def test_references_inside_a_plot_lead_somewhere(name: str) -> None:
    svg = drawn(name)
    ids = re.findall(r'\sid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', svg)) <= set(ids)


def test_long_names_leave_room_for_the_points() -> None:
    long = Candidate("a-variant-" * 20, 0.01, 0.3, True, True, True)
    svg = draw_tradeoff([long], [("a teacher " * 20, 0.02)])
    assert any(text.endswith("… (default)") for text in texts_of(svg))


# --- waterfall


def test_increments_start_where_the_hop_before_arrived() -> None:
    assert measured_increments(HOPS) == [
        Increment("teacher", "", 0.0, 0.0),
        Increment("pruned", "teacher", 0.0, 1.05),
        Increment("trained", "pruned", 1.05, 0.25),
        Increment("int8", "trained", 0.25, 0.26),
    ]


def test_variants_start_at_the_hop_that_they_name() -> None:
    hops = (*HOPS[:3], Hop("int8", 0.26, after="trained"), Hop("int4", 0.5, after="trained"))
    assert measured_increments(hops)[-1] == Increment("int4", "trained", 0.25, 0.5)


@pytest.mark.parametrize("kl", [None, math.nan, math.inf])
def test_hop_behind_one_without_a_number_starts_before_it(kl: float | None) -> None:
    hops = (Hop("teacher", 0.0), Hop("pruned", kl), Hop("trained", 0.25))
    assert measured_increments(hops)[1:] == [Increment("trained", "teacher", 0.0, 0.25)]
    hops = (*hops[:2], Hop("other", 0.5, after="teacher"), Hop("trained", 0.25, after="pruned"))
    assert measured_increments(hops)[-1] == Increment("trained", "teacher", 0.0, 0.25)


def test_waterfall_labels_totals_and_signed_changes() -> None:
    found = texts_of(drawn("waterfall"))
    assert {"teacher", "pruned", "trained", "int8"} <= set(found)
    assert [re.sub(r"\s+", " ", text) for text in found if text[0].isdigit() and "(" in text] == [
        "1.05 (+1.05)",
        "0.25 (-0.8)",
        "0.26 (+0.01)",
    ]


def test_waterfall_bar_lies_between_its_totals() -> None:
    svg = draw_waterfall([Increment("a", "", 0.0, 1.0), Increment("b", "a", 1.0, 0.5)])
    bars = [
        [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path.attrib["d"])]
        for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
        if "opacity: 0.75" in path.attrib.get("style", "")
    ]
    (first, second) = [(min(bar), max(bar)) for bar in bars]
    assert second[1] == pytest.approx(first[1])
    assert second[0] == pytest.approx(sum(first) / 2, abs=0.01)


# --- Pareto


def test_pareto_names_default_failed_variants_and_teachers() -> None:
    found = texts_of(drawn("pareto"))
    expected = {"fp32", "int8 (default)", "int4 (failed a gate)", "torch", "transformers"}
    assert expected <= set(found)


def test_front_is_drawn_in_order_of_time_and_only_through_its_points() -> None:
    def num_corners(candidates: tuple[Candidate, ...]) -> list[int]:
        paths = ElementTree.fromstring(draw_tradeoff(candidates, [])).iter(f"{SVG}path")
        lines = [p for p in paths if "stroke: #0072b2" in p.attrib.get("style", "")]
        return [len(re.findall("[ML]", p.attrib["d"])) for p in lines if "clip-path" in p.attrib]

    assert (
        num_corners(CANDIDATES) == num_corners(CANDIDATES[::-1]) == [3]
    )  # steps: across, then down
    assert num_corners(CANDIDATES[2:]) == []


# --- training


def test_phase_has_a_panel_per_unit_then_learning_rate_and_repetition() -> None:
    svg = drawn("phase")
    heights = [
        place(svg, name)[1]
        for name in ("nats per token", "mean square", "learning rate", "repeated share")
    ]
    assert heights == sorted(heights)
    assert {"forward KL", "hidden", "optimizer step"} <= set(texts_of(svg))


def test_phase_without_learning_rates_has_no_panel_for_them() -> None:
    found = texts_of(draw_phase(PhaseCurves("SFT", (1, 2), PHASE.terms[:0], (1.0, 2.0)), "phase"))
    assert "learning rate" in found
    assert "repeated share" not in found
    term = LossTerm("cross-entropy", (2.0, 1.0))
    assert "learning rate" not in texts_of(draw_phase(PhaseCurves("SFT", (1, 2), (term,)), "phase"))


def test_term_is_named_at_its_last_finite_value() -> None:
    def label_at(values: tuple[float, ...]) -> tuple[float, float]:
        other = LossTerm("other", (3.0, 2.9, 2.8))
        phase = PhaseCurves("KD", (1, 2, 3), (LossTerm("soft", values), other))
        return place(draw_phase(phase, "phase"), "soft")

    assert label_at((2.0, 1.0, math.nan))[0] < label_at((2.0, 1.5, 1.0))[0]
    everything_lost = PhaseCurves("KD", (1, 2), (LossTerm("soft", (math.nan, math.nan)),))
    assert "soft" not in texts_of(draw_phase(everything_lost, "phase"))


def test_series_of_another_length_than_the_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="same first dimension"):
        draw_phase(PhaseCurves("KD", (1, 2, 3), (LossTerm("soft", (1.0, 0.5)),)), "phase")


# --- bars


def test_layers_stand_in_order_of_removal_with_their_kl() -> None:
    svg = drawn("layers")
    assert place(svg, "12")[0] < place(svg, "3")[0]
    assert {"0.08", "0.2"} <= set(texts_of(svg))


def test_pass_rates_are_equal_bins_from_0_to_100_percent() -> None:
    found = texts_of(drawn("pass_rates"))
    names = [text for text in found if "–" in text]
    assert names == ["0–25", "25–50", "50–75", "75–100"]
    assert [text for text in found if text in ("5", "0", "2", "9")][-4:] == ["5", "0", "2", "9"]
