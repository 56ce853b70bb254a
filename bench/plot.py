"""Decode throughput against batch, for all sides of a comparison: `python -m bench.plot IN OUT`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.results import Results, Spread, read_results


def plot(results: Results, path: Path) -> None:
    """Draw medians as lines and the range over the rounds as bars; Tandem solid, peers dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, side in enumerate(results.sides):
        _draw_side(axes, results, side, f"C{index % 10}")
    axes.set(
        xlabel="sequences decoded together",
        ylabel="decoded tokens per second",
        title=f"{results.machine['cpu']}, {results.machine['num_cores']} cores",
        xticks=results.config.batches,
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


def _draw_side(axes: Any, results: Results, side: str, color: str) -> None:
    """A side that was not measured at any batch is left out of the picture."""
    points = [(b, s) for b in results.config.batches if (s := results.spread(side, "decode", b))]
    if not points:
        return
    batches, spreads = zip(*points, strict=True)
    axes.errorbar(
        batches,
        [s.median for s in spreads],
        yerr=_bars(spreads),
        label=f"{side} ({results.sides[side].weights})",
        color=color,
        linestyle="-" if side.startswith("tandem-") else "--",
        marker="o" if side.startswith("tandem-") else "s",
        capsize=2,
    )


def _bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return how far the least lies below and the greatest above each median."""
    return [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.plot", description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULT.json")
    parser.add_argument("image", type=Path, metavar="OUT.png")
    options = parser.parse_args(argv)
    plot(read_results(options.results), options.image)


if __name__ == "__main__":
    main()
