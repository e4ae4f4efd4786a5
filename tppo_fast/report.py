"""A run's story as one self-contained HTML page: verdict, table, curves, labelled tokens, settings, machine record."""

from __future__ import annotations

import base64
import io
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tppo_fast.atomic import write_atomic
from tppo_fast.errors import UserError
from tppo_fast.estimates import Difference, Estimate, few_users
from tppo_fast.metrics import GLOSSARY, recorded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LABELS = {
    "rollout/reward_per_token": "reward per token",
    "eval/relevance": "held-out relevance",
    "eval/hit": "hit rate",
    "eval/mrr": "MRR",
    "eval/exact": "exact matches",
    "eval/judged": "share judged relevant",
    "eval/length": "response length (tokens)",
    "ppo/kl": "KL to the reference (nats per token)",
    "rollout/length_mean": "response length (tokens)",
    "rollout/token_reward_mean": "relevant minus irrelevant tokens per response",
    "rollout/token_reward_std": "spread of relevant minus irrelevant tokens",
}
"""How a metric is called in the page, unit included; others go by the last part of their name."""

Axis = Literal["samples", "seconds"]
AXIS_LABELS: dict[Axis, str] = {"samples": "responses sampled", "seconds": "seconds of training"}

# Okabe and Ito's palette without yellow: told apart under every common colour blindness, and by line style again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run. Runs of the same name (other seeds) share a colour and one legend entry."""

    name: str
    """The method, as the legend shows it."""
    rows: Sequence[Mapping[str, float | None]]
    """The rows of ``metrics.read_metrics``: ``step`` and metrics; None where a value was not finite."""
    samples_per_step: int
    """Responses sampled per step: the curves' x axis counts samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One response whose tokens are shown with their class and reward."""

    caption: str
    """What it answers, such as the history and the true next queries."""
    tokens: Sequence[tuple[str, int, float]]
    """(token text, class, reward) in order; class 0 separator, 1 irrelevant, 2 relevant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a report says."""

    title: str
    """Heading of the page."""
    verdict: str
    """The result in plain language, such as ``verdict`` returns."""
    command: str
    """The shell command that makes this report again."""
    settings: Mapping[str, Any]
    """The configuration, nested as in the config file."""
    runs: Sequence[Run] = ()
    """The runs whose curves are drawn together."""
    table: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """method -> metric -> estimate; a metric that a method lacks is shown as a dash."""
    baseline: str = ""
    """The method that ``differences`` are about."""
    differences: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    """another method -> metric -> the baseline's paired difference from it, p-values corrected."""
    examples: Sequence[Example] = ()
    """Labelled responses."""
    number_shown: str = "the reward it received"
    """What the number under an example's token is."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Caption -> any further figure."""
    curves: Sequence[Curve] = field(default_factory=lambda: CURVES)
    """What is drawn."""
    axes: Sequence[Axis] = ("samples",)
    """Against what: responses sampled, or seconds of training (evaluations left out)."""
    formats: Sequence[Literal["png", "svg"]] = ("png",)
    """Kinds of the figure files beside the page."""
    machine: Mapping[str, str] = field(default_factory=lambda: machine_record())
    """Where it ran; ``machine_record()`` unless given."""


PHASES = ("time/rollout", "time/sync", "time/score", "time/prepare", "time/update", "time/step")
"""What a step's time is split into."""


class Curve(NamedTuple):
    slug: str
    metric: str
    band: tuple[str, str] | None = None


CURVES = (
    Curve("reward", "rollout/reward_per_token"),
    Curve("relevance", "eval/relevance", ("eval/relevance_low", "eval/relevance_high")),
    Curve("kl", "ppo/kl"),
    Curve("length", "rollout/length_mean"),
)


def verdict(
    name_a: str, name_b: str, difference: float, low: float, high: float, metric: str, *, p: float | None = None
) -> str:
    """One sentence on A - B for ``metric`` with the ends of its 95 % confidence interval.

    With ``p``, corrected for the number of comparisons, a difference is shown where that is below 0.05 as well.

    Raises:
        ValueError: low is above high.
    """
    what = label(metric)
    if not all(map(math.isfinite, (difference, low, high))):
        return f"No difference could be shown between {name_a} and {name_b} on {what}: it could not be computed."
    if low > high:
        raise ValueError(f"interval [{low}, {high}]: low must not be above high")
    interval = f"95 % interval {low:+.3f} to {high:+.3f}"
    if low <= 0.0 <= high:
        return (
            f"No difference could be shown between {name_a} and {name_b} on {what}: "
            f"{difference:+.3f}, and the {interval} contains zero."
        )
    if p is not None and not p < 0.05:
        return (
            f"No difference could be shown between {name_a} and {name_b} on {what}: "
            f"{difference:+.3f} ({interval}), but p is {p:.3f} once corrected for the number of comparisons."
        )
    word = "above" if low > 0.0 else "below"
    sure = "" if p is None else f", corrected p {p:.3f}" if p >= 0.001 else ", corrected p below 0.001"
    return f"{name_a} is {word} {name_b} on {what} by {abs(difference):.3f} ({interval} for the difference{sure})."


def label(metric: str) -> str:
    """What a metric is called in text."""
    return LABELS.get(metric, metric.rpartition("/")[2].replace("_", " "))


def machine_record() -> dict[str, str]:
    """The versions, device and commit that a result depends on."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "tppo-fast": _version("tppo-fast"),
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
        "commit": _commit(),
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of this source file, with -dirty after local changes; an installed copy has none."""
    git, here = shutil.which("git"), Path(__file__).resolve()
    if git is None:
        return "unknown"

    def ask(*arguments: str) -> str | None:
        command = [git, "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A virtual environment may lie inside somebody else's repository: only a tracked file has a commit.
    tracked = ask("ls-files", "--error-unmatch", here.name) is not None
    return (ask("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if tracked else None) or "unknown"


def write_report(path: Path, report: Report) -> list[Path]:
    """Write the page to ``path`` and each curve beside it as ``<stem>-<curve>.png``, ``-seconds`` added for that axis.

    Returns all paths written.

    Raises:
        UserError: a file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(label=label, number=number, visible=visible)
    present = [curve for curve in report.curves if any(_points(curve.metric, run) for run in report.runs)]
    drawn: dict[tuple[Curve, Axis], Figure] = {
        (curve, axis): draw(curve, report.runs, axis) for axis in report.axes for curve in present
    }
    images = {key: _image(figure, "png") for key, figure in drawn.items()}
    page = environment.get_template("report.html").render(
        report=report,
        figures=[
            (caption, base64.b64encode(_image(figure, "png")).decode()) for caption, figure in report.figures.items()
        ],
        curves=[(c.metric, AXIS_LABELS[axis], base64.b64encode(png).decode()) for (c, axis), png in images.items()],
        not_recorded=[label(curve.metric) for curve in report.curves if curve not in present] if report.runs else [],
        few_users=few_users(report.table),
        columns=list(dict.fromkeys(metric for row in report.table.values() for metric in row)),
        compared=list(dict.fromkeys(metric for row in report.differences.values() for metric in row)),
        phases={run.name: row for run in report.runs if (row := phase_means(run))},
        phase_names=PHASES,
        settings=list(flatten(report.settings)),
        glossary={name: GLOSSARY[name] for name in _mentioned(report) if name in GLOSSARY},
    )
    files = {
        path.with_name(f"{path.stem}-{curve.slug}{'' if axis == 'samples' else f'-{axis}'}.{kind}"): _image(
            figure, kind
        )
        for (curve, axis), figure in drawn.items()
        for kind in report.formats
    }
    files[path] = page.encode(errors="backslashreplace")  # a lone surrogate in a response must not cost the report
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in files.items():
            write_atomic(target, content)
    except OSError as error:
        raise UserError(f"report {str(path)!r} cannot be written ({error.strerror}): choose another folder") from None
    return list(files)


def phase_means(run: Run) -> dict[str, float]:
    """Mean seconds per step of each phase that the run logged."""
    values = {name: [v for row in run.rows if (v := row.get(name)) is not None] for name in PHASES}
    return {name: sum(v) / len(v) for name, v in values.items() if v}


def _mentioned(report: Report) -> list[str]:
    logged = {name for run in report.runs for row in run.rows for name in row}
    return sorted(logged | {metric for row in report.table.values() for metric in row})


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def number(value: float) -> str:
    """Three decimals for what is about one, three digits otherwise; a dash for NaN."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.3g}"


def visible(token: str) -> str:
    """A token's text with line breaks, tabs and unprintable characters made visible."""
    named = {"\n": "↵", "\t": "⇥"}
    return "".join(named.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in token)


def _points(metric: str, run: Run, axis: Axis = "samples") -> list[tuple[float, float]]:
    """(samples or seconds, value) where the metric was recorded."""
    return [(getattr(p, axis), p.value) for p in recorded(run.rows, metric, run.samples_per_step)]


def draw(curve: Curve, runs: Sequence[Run], axis: Axis = "samples") -> Figure:
    """One metric of every run against the number of responses sampled, or the seconds trained.

    Runs of one name are seeds of one method: their mean is drawn, and a band from the lowest to the highest. The band of a
    single run is ``curve.band``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seeds: dict[str, list[Run]] = {}
    for run in runs:
        seeds.setdefault(run.name, []).append(run)
    rows_of_legend = -(-len(seeds) // 2)
    figure = Figure(figsize=(6.4, 3.9 + 0.2 * rows_of_legend), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[str, Line2D] = {}
    for order, (name, group) in enumerate(seeds.items()):
        colour, style = COLOURS[order % len(COLOURS)], STYLES[order % len(STYLES)]
        points = _band(curve, group[0], axis) if len(group) == 1 else _spread(curve.metric, group, axis)
        if points:
            lines[name] = _draw_points(axes, points, name, colour, style)
    most = max(map(len, seeds.values()), default=1)
    note = f"\nline: mean of up to {most} seeds, band: lowest to highest" if most > 1 else ""
    _decorate(axes, label(curve.metric), AXIS_LABELS[axis] + note)
    if lines:
        blank = [" "] * len(lines)
        where = {"loc": "outside lower center", "ncols": 2, "handlelength": 3.5}  # long enough to tell dashes
        legend = figure.legend([*lines.values()], blank, frameon=False, fontsize=9, **where)
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set(text=name, parse_math=False)  # as a label a formula would be set, and what begins with _ hidden
    return figure


Point = tuple[float, float, float, float]
"""x, y, and the ends of its band, NaN where there is none."""


def _band(curve: Curve, run: Run, axis: Axis) -> list[Point]:
    low, high = (dict(_points(name, run, axis)) for name in curve.band or ("", ""))
    return [(x, y, low.get(x, math.nan), high.get(x, math.nan)) for x, y in _points(curve.metric, run, axis)]


def _spread(metric: str, runs: Sequence[Run], axis: Axis) -> list[Point]:
    """Over the seeds that recorded the metric in a step; x is their mean, too."""
    steps: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        at = [row["step"] or 0.0 for row in run.rows if metric in row]
        for step, point in zip(at, _points(metric, run, axis), strict=True):
            steps.setdefault(step, []).append(point)
    columns = [zip(*steps[step], strict=True) for step in sorted(steps)]
    found: list[Point] = []
    for x, y in columns:
        low, high = (min(y), max(y)) if all(map(math.isfinite, y)) else (math.nan, math.nan)
        found.append((fmean(x), fmean(y), low, high))
    return found


def _draw_points(axes: Axes, points: Sequence[Point], name: str, colour: str, style: str) -> Line2D:
    x, y, low, high = zip(*points, strict=True)
    smooth = _moving_mean(y)
    if len(smooth) != len(y) or smooth != list(y):  # the raw curve stays visible behind its moving mean
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    marker = "o" if len(points) <= 25 else ""
    (line,) = axes.plot(x, smooth, style, color=colour, linewidth=2.0, marker=marker, markersize=4, label=name)
    if any(map(math.isfinite, low)):
        axes.fill_between(x, _moving_mean(low), _moving_mean(high), color=colour, alpha=0.16, linewidth=0)
    return line


def _moving_mean(values: Sequence[float], points: int = 25) -> list[float]:
    """Mean over the last len / points values, so that about ``points`` independent values remain; NaN is skipped."""
    window = max(len(values) // points, 1)
    means = []
    for i in range(len(values)):
        kept = [v for v in values[max(i + 1 - window, 0) : i + 1] if math.isfinite(v)]
        means.append(sum(kept) / len(kept) if kept and math.isfinite(values[i]) else math.nan)
    return means


def _decorate(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title[0].upper() + title[1:], loc="left", fontsize=12, fontweight="bold", color="#1a1a1a")
    axes.set_xlabel(x_label, color="#444444")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#444444", labelsize=9)
    axes.margins(x=0.02)


def _image(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()
