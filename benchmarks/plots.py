"""Plots of the kept results, as SVG that carries the hash of the files it was drawn from."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results, tables
from benchmarks.providers import SUITES
from benchmarks.results import NOT_MEASURED, Result
from tppo_fast.report import COLOURS, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LEARNING = "Learning, a line for each seed"


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
            draw = partial({"learning": learning, "step": bars}.get(suite, sweeps), report)
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


def _colours(providers: Sequence[str]) -> dict[str, str]:
    """A colour for each in a panel, variants of one provider sharing theirs; tppo_fast has the first."""
    names = dict.fromkeys(["tppo_fast", *(provider.split(":")[0] for provider in providers)])
    of = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    return {provider: of[provider.split(":")[0]] for provider in providers}


def _title(axes: Axes, text: str) -> None:
    text = "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, 34))
    axes.set_title(text, loc="left", fontsize=8, fontweight="bold", color="#1a1a1a")


def sweeps(report: Mapping[str, Any]) -> Figure:
    """Every size that was swept against the median, both logarithmic, 20 to 80 % quantiles as bands; without any, bars."""
    rows = [row for row in results.rows_of(report) if row.median is not None]
    groups: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[Result]] = {}
    for row in rows:
        for axis in row.sizes:
            fixed = tuple(sorted((k, v) for k, v in row.sizes.items() if k != axis))
            groups.setdefault((row.family, axis, fixed), []).append(row)
    swept = {key: members for key, members in groups.items() if len({row.sizes[key[1]] for row in members}) >= 3}
    if not swept:
        return bars(report)
    columns = 3 if len(swept) > 2 else len(swept)
    figure, panels = _figure(columns, max(-(-len(swept) // columns), 1))
    for axes, ((family, axis, fixed), members) in zip(panels, swept.items(), strict=False):
        _sweep(axes, axis, members)
        _title(axes, f"{family}\n{', '.join(f'{v:,} {k}' for k, v in fixed)}")
    for axes in panels[len(swept) :]:
        axes.set_axis_off()
    return figure


def _sweep(axes: Axes, axis: str, members: Sequence[Result]) -> None:
    names = list(dict.fromkeys(row.provider for row in members))
    colours = _colours(names)
    for name in names:
        points = sorted((row.sizes[axis], row.median, row.q20, row.q80) for row in members if row.provider == name)
        x, y, low, high = zip(*points, strict=True)
        same = [n for n in names if n.split(":")[0] == name.split(":")[0]]
        style = STYLES[same.index(name) % len(STYLES)]
        axes.plot(x, y, style, color=colours[name], marker="o", markersize=3, linewidth=1.4, label=name)
        axes.fill_between(x, low, high, color=colours[name], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(axis, fontsize=8)
    axes.set_ylabel({"s": "seconds"}.get(members[0].unit, members[0].unit), fontsize=8)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=6, loc="upper left")


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
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("held-out relevance", fontsize=8)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    _title(axes, LEARNING)


def summary() -> Figure:
    """The README's plot: what each op gains over eager torch, one step's seconds, and the learning curves, all on the CPU."""
    kept = tables.kept("cpu")
    figure, panels = _figure(3)
    titles = {"ops": "Ops, times faster than eager", "step": "One PPO step, seconds", "learning": LEARNING}
    for axes, (suite, title) in zip(panels, titles.items(), strict=True):
        _title(axes, title)
        if suite not in kept:
            axes.text(0.5, 0.5, NOT_MEASURED, ha="center", transform=axes.transAxes, color="#888888")
            axes.set_axis_off()
        elif suite == "ops":
            _gains(axes, results.rows_of(kept[suite]))
        elif suite == "step":
            rows = tables.families(results.rows_of(kept[suite]))[0][0]
            _bars(axes, rows)
            _title(axes, f"{title}\n{rows[0].case}")
        else:
            _curves(axes, kept[suite], 0, "responses sampled")
    return figure


def bars(report: Mapping[str, Any]) -> Figure:
    """Seconds of everything that several rows were timed at, a panel each; the counter slows down what it counted."""
    cases = tables.by_case(results.rows_of(report)).values()
    timed = [rows for rows in cases if rows[0].unit == "s" and sum(r.median is not None for r in rows) > 1]
    columns = min(max(len(timed), 1), 3)
    figure, panels = _figure(columns, max(-(-len(timed) // columns), 1), height=2.2)
    for axes, rows in zip(panels, timed, strict=False):
        _bars(axes, rows)
        _title(axes, rows[0].case.replace(": ", "\n"))
    for axes in panels[len(timed) :]:
        axes.set_axis_off()
    return figure


def _gains(axes: Axes, rows: Sequence[Result]) -> None:
    """For each op ours and the best of the others."""
    labels, widths, found = [], [], []
    for usual, *_ in tables.whole(tables.families(rows)):
        pair = tables.against(usual)
        for row in (pair.ours, pair.other):
            if row is not None and row.ratio:
                what = row.family.rpartition(", ")[0] if row is pair.ours else ""
                what = "GAE, against a loop" if what == "GAE" else what  # which is its baseline
                labels.append(f"{what.removesuffix(', all terms, forward + backward')}  {row.provider.split(',')[0]}")
                widths.append(row.ratio)
                found.append(row.provider)
    axes.barh(range(len(widths)), widths, color=[_colours(found)[name] for name in found])
    axes.set_yticks(range(len(widths)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times faster than eager torch (GAE: than a loop over time), logarithmic", fontsize=7)
    axes.axvline(1.0, color="#444444", linewidth=0.8)


def _bars(axes: Axes, rows: Sequence[Result]) -> None:
    """The medians, with whiskers from the 20 to the 80 % quantile."""
    measured = [row for row in rows if row.median is not None]
    median = [row.median or 0.0 for row in measured]
    spread = [[m - (row.q20 or m) for m, row in zip(median, measured, strict=True)],
              [(row.q80 or m) - m for m, row in zip(median, measured, strict=True)]]  # fmt: skip
    colours = list(_colours([row.provider for row in measured]).values())
    axes.barh(range(len(measured)), median, xerr=spread, color=colours, ecolor="#444444")
    axes.set_yticks(range(len(measured)), [row.provider for row in measured], fontsize=7)
    logarithmic = max(median) > 100 * min(median)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(f"seconds{', logarithmic' if logarithmic else ''}", fontsize=8)
    axes.invert_yaxis()
