"""Figures beside a run's curves: losses and reliability of a reward model, histograms of token rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tppo_fast.report import COLOURS, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLASS_COLOURS = {"separator": "#9aa1a9", "irrelevant": "#D55E00", "relevant": "#0072B2"}


def curves(
    rows: Sequence[Mapping[str, float | None]], names: Mapping[str, str], title: str, x_label: str = "optimizer steps"
) -> Figure:
    """Metrics of one run against its steps.

    Args:
        rows: as from ``metrics.read_metrics``.
        names: metric -> what the legend calls it; a metric that was never logged is left out.
    """
    figure, axes = _figure(title, x_label, "")
    for order, (metric, label) in enumerate(names.items()):
        points = [(row["step"] or 0.0, value) for row in rows if (value := row.get(metric)) is not None]
        if points:
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) <= 25 else ""
            axes.plot(x, y, STYLES[order], color=COLOURS[order], marker=marker, markersize=4, label=label)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return figure


def reliability(bins: Sequence[tuple[float, float, int]], title: str = "Reliability") -> Figure:
    """(mean confidence, share relevant, tokens) of each bin against the diagonal; a point's area grows with its tokens."""
    figure, axes = _figure(title, "predicted P(relevant)", "share relevant")
    axes.plot([0, 1], [0, 1], ":", color="#888888", label="perfectly calibrated")
    if bins:
        x, y, tokens = zip(*bins, strict=True)
        axes.plot(x, y, "-", color=COLOURS[0], linewidth=1.0)
        axes.scatter(x, y, s=[12 + 160 * n / max(tokens) for n in tokens], color=COLOURS[0], label="held-out tokens")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def reward_histogram(rewards: Mapping[str, Sequence[float]], title: str = "Reward of a token") -> Figure:
    """Stacked histogram of token rewards; class name -> rewards of its tokens."""
    figure, axes = _figure(title, "reward", "tokens")
    kept = {name: values for name, values in rewards.items() if len(values)}
    if kept:
        colours = [_CLASS_COLOURS.get(name, COLOURS[-1]) for name in kept]
        axes.hist(list(kept.values()), bins=30, stacked=True, color=colours, label=list(kept))
        axes.legend(frameon=False, fontsize=9, loc="upper center")
    return figure


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color="#1a1a1a")
    axes.set_xlabel(x_label, color="#444444")
    axes.set_ylabel(y_label, color="#444444")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#444444", labelsize=9)
    return figure, axes
