"""Plots of the kept results, as SVG that carries the hash of the files it was drawn from."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results, tables
from benchmarks.providers import PROVIDERS, SUITES
from benchmarks.results import NOT_MEASURED, Result
from tppo_fast.report import COLOURS, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = [provider.name for provider in PROVIDERS]


def digest(paths: Sequence[Path]) -> str:
    """Of the files' bytes, in order."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def embedded(svg: bytes) -> str | None:
    """The hash that a plot carries."""
    found = re.search(rb"drawn from sha256:([0-9a-f]{64})", svg)
    return found.group(1).decode() if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One file."""

    path: Path
    """Where it is kept."""
    sources: list[Path]
    """The results that it is drawn from."""
    draw: Callable[[], Figure]
    """Draws it."""

    def svg(self) -> bytes:
        import matplotlib

        buffer, note = io.BytesIO(), f"drawn from sha256:{digest(self.sources)}"
        with matplotlib.rc_context({"svg.hashsalt": "tppo_fast", "svg.fonttype": "none"}):
            self.draw().savefig(buffer, format="svg", metadata={"Date": None, "Description": note})
        return buffer.getvalue()


def planned() -> list[Plot]:
    """Every plot of what was measured."""
    whole = [path for suite in SUITES for path in results.files(results.ROOT / "cpu", suite)]
    found = [Plot(path=results.ROOT / "summary.svg", sources=whole, draw=summary)]
    for device in ("cpu", *tables.gpus()):
        for suite, report in tables.kept(device).items():
            draw = partial(learning if suite == "learning" else sweeps, report)
            files = results.files(results.ROOT / device, suite)
            found.append(Plot(path=results.ROOT / device / f"{suite}.svg", sources=files, draw=draw))
    return found


def _figure(columns: int, rows: int = 1, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors="#444444", labelsize=8)
        axes.set_axisbelow(True)
    return figure, panels


def _colour(provider: str) -> str:
    name = provider.split(":")[0]
    return COLOURS[ORDER.index(name) % len(COLOURS)] if name in ORDER else "#888888"


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9, fontweight="bold", color="#1a1a1a")


def sweeps(report: Mapping[str, Any]) -> Figure:
    """Every size that was swept against the median, both logarithmic; bands from the 20 to the 80 % quantile."""
    rows = [row for row in results.rows_of(report) if row.median is not None]
    groups: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[Result]] = {}
    for row in rows:
        for axis in row.sizes:
            fixed = tuple(sorted((k, v) for k, v in row.sizes.items() if k != axis))
            groups.setdefault((row.family, axis, fixed), []).append(row)
    swept = {key: members for key, members in groups.items() if len({row.sizes[key[1]] for row in members}) >= 3}
    columns = 3 if len(swept) > 2 else max(len(swept), 1)
    figure, panels = _figure(columns, max(-(-len(swept) // columns), 1))
    for axes, ((family, axis, fixed), members) in zip(panels, swept.items(), strict=False):
        _sweep(axes, axis, members)
        _title(axes, f"{family}\n{', '.join(f'{v:,} {k}' for k, v in fixed)}")
    for axes in panels[len(swept) :]:
        axes.set_axis_off()
    if not swept:
        panels[0].text(0.5, 0.5, "no size was swept", ha="center")
    return figure


def _sweep(axes: Axes, axis: str, members: Sequence[Result]) -> None:
    names = list(dict.fromkeys(row.provider for row in members))
    for name in names:
        points = sorted((row.sizes[axis], row.median, row.q20, row.q80) for row in members if row.provider == name)
        x, y, low, high = zip(*points, strict=True)
        same = [n for n in names if n.split(":")[0] == name.split(":")[0]]
        style = STYLES[same.index(name) % len(STYLES)]
        axes.plot(x, y, style, color=_colour(name), marker="o", markersize=3, linewidth=1.4, label=name)
        axes.fill_between(x, low, high, color=_colour(name), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(axis, fontsize=8)
    axes.set_ylabel({"s": "seconds"}.get(members[0].unit, members[0].unit), fontsize=8)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=6)


def learning(report: Mapping[str, Any]) -> Figure:
    """Held-out relevance of each seed against responses sampled and seconds of training."""
    figure, panels = _figure(2)
    for axes, place, label in zip(panels, (0, 1), ("responses sampled", "seconds of training"), strict=True):
        _curves(axes, report, place, label)
    return figure


def _curves(axes: Axes, report: Mapping[str, Any], place: int, label: str) -> None:
    for order, (name, curves) in enumerate(report["curves"].items()):
        for k, curve in enumerate(curves):
            x, y = [point[place] for point in curve], [point[2] for point in curve]
            style = STYLES[order % len(STYLES)]
            axes.plot(x, y, style, color=COLOURS[order], linewidth=1.4, alpha=0.8, label=name if not k else f"_{name}")
    axes.axhline(report["settings"]["target"], color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("held-out relevance", fontsize=8)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=7)
    _title(axes, "Learning")


def summary() -> Figure:
    """The README's plot: what each op gains over eager torch, one step's seconds, and the learning curves, all on the CPU."""
    kept = tables.kept("cpu")
    figure, panels = _figure(3)
    titles = {"ops": "Ops, times faster than eager", "step": "One PPO step, seconds", "learning": "Learning"}
    for axes, (suite, title) in zip(panels, titles.items(), strict=True):
        _title(axes, title)
        if suite not in kept:
            axes.text(0.5, 0.5, NOT_MEASURED, ha="center", transform=axes.transAxes, color="#888888")
            axes.set_axis_off()
        elif suite == "ops":
            _gains(axes, results.rows_of(kept[suite]))
        elif suite == "step":
            _bars(axes, tables.heads(results.rows_of(kept[suite]))[0])
        else:
            _curves(axes, kept[suite], 0, "responses sampled")
    return figure


def _gains(axes: Axes, rows: Sequence[Result]) -> None:
    """For each op ours and the best of the others."""
    labels, widths, colours = [], [], []
    for members in tables.heads(rows):
        other = tables.best_other(members)
        for row in (members[0], other):
            if row is not None and row.ratio:
                labels.append(f"{members[0].family.split(',')[0]}\n{row.provider}")
                widths.append(row.ratio)
                colours.append(_colour(row.provider))
    axes.barh(range(len(widths)), widths, color=colours)
    axes.set_yticks(range(len(widths)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="#444444", linewidth=0.8)


def _bars(axes: Axes, rows: Sequence[Result]) -> None:
    measured = [row for row in rows if row.median is not None]
    axes.barh(
        range(len(measured)), [row.median or 0.0 for row in measured], color=[_colour(row.provider) for row in measured]
    )
    axes.set_yticks(range(len(measured)), [row.provider for row in measured], fontsize=7)
    axes.invert_yaxis()
