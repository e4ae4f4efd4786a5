"""What a suite leaves: rows, as JSON under ``benchmarks/results/<device>/<suite>.json``, and what is read out of them.

Imports no torch: tables, plots and checks are made from kept files alone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tppo_fast.atomic import write_atomic

ROOT = Path(__file__).parent / "results"
NOT_MEASURED = "not measured yet"
LEFT_OUT = "left out: the time was over"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the runner passes to ``bench_<suite>.run(options) -> Outcome``."""

    providers: Sequence[str] | None = None
    """Names of ``providers.PROVIDERS`` to run; None: all of the suite."""
    threads: int = 1
    """CPU threads of every provider."""
    quick: bool = False
    """Tiny sizes: that everything runs, not how fast."""
    rounds: int | None = None
    """Turns that every provider takes; None: the suite's own number."""
    seed: int = 0
    """Decides inputs, models and sampling."""
    model: Path = Path(".cache/smollm2")
    """A folder with a causal LM, for the rollout and step suites."""
    shape: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the step suite that replace its own: prompts, prompt_tokens, samples, new_tokens, microbatch."""
    scratch: Path = Path("build/bench")
    """Where models, peers' files and runs go; what is there already is used."""


@dataclass(slots=True, kw_only=True)
class Result:
    """One provider in one case."""

    case: str
    """What is computed, with its shape; rows of the same case are compared."""
    provider: str
    """A name of ``providers.PROVIDERS``, with ``: variant`` after it where there are several."""
    family: str = ""
    """The case without its sizes: exponents are fitted and curves drawn within one."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Axis -> size, such as {"tokens": 2048, "vocabulary": 49152}."""
    unit: str = "s"
    """Of ``values``: "s", "responses" or "FLOP" (less is better), "tokens/s", "relevance" or "MFU" (more is better)."""
    values: list[float] = field(default_factory=list)
    """One a round, in the order taken."""
    problem: str | None = None
    """Why there are no values: it disagrees, or cannot run here."""
    median: float | None = None
    q20: float | None = None
    q80: float | None = None
    ratio: float | None = None
    """How many times better than the case's baseline: above 1 is better whatever the unit."""
    baseline: bool = False
    """It is the case's baseline."""
    share_of_ceiling: float | None = None
    """The ideal time at the device's measured ceiling over the median."""
    host_peak_bytes: int | None = None
    """Host memory beyond the inputs at the peak; what it counts exactly is the suite's to say."""
    device_peak_bytes: int | None = None
    """Memory of the accelerator beyond the inputs at the peak; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What ``run`` returns."""

    results: Sequence[Result]
    """Rows of every provider that ran or, with its ``problem``, did not."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the figures depend on beyond ``Options``: model, sizes, rounds."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the file keeps: learning curves, counts."""


def summarise(rows: Sequence[Result]) -> None:
    """Fill in medians, quantiles and, case by case, ratios to the baseline."""
    for row in rows:
        if row.values:
            ordered = sorted(row.values)
            row.median = statistics.median(ordered)
            row.q20, row.q80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    base = {row.case: row.median for row in rows if row.baseline and row.median}
    for row in rows:
        if row.median and (other := base.get(row.case)):
            row.ratio = row.median / other if more_is_better(row.unit) else other / row.median


def more_is_better(unit: str) -> bool:
    return unit in ("tokens/s", "relevance", "MFU")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponent:
    """A fitted power law: values grow like size ** ``power``."""

    family: str
    provider: str
    axis: str
    """The size that grows while the others stay."""
    fixed: dict[str, int]
    """The others."""
    power: float
    stderr: float
    """Standard error of ``power``; NaN for an exact fit of two points is never reported: three sizes are needed."""
    sizes: list[int]


def exponents(rows: Sequence[Result]) -> list[Exponent]:
    """A power law for each provider and each size that took three or more values while the others stayed the same."""
    from scipy.stats import linregress

    groups: dict[tuple[str, str, str, tuple[tuple[str, int], ...]], dict[int, float]] = {}
    for row in rows:
        for axis, size in row.sizes.items():
            if row.median and size > 0:
                fixed = tuple(sorted((k, v) for k, v in row.sizes.items() if k != axis))
                groups.setdefault((row.family, row.provider, axis, fixed), {})[size] = row.median
    found = []
    for (family, provider, axis, fixed), points in groups.items():
        if len(points) >= 3:
            x, y = zip(*sorted(points.items()), strict=True)
            fit: Any = linregress([math.log(v) for v in x], [math.log(v) for v in y])
            found.append(
                Exponent(
                    family=family,
                    provider=provider,
                    axis=axis,
                    fixed=dict(fixed),
                    power=float(fit.slope),
                    stderr=float(fit.stderr),
                    sizes=list(x),
                )
            )
    return found


def report(suite: str, command: str, options: Options, outcome: Outcome, record: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of a result file. ``record``: machine, libraries and providers."""
    rows = list(outcome.results)
    return {
        "suite": suite, "command": command, **record,
        "settings": {"threads": options.threads, "seed": options.seed, **outcome.settings},
        "results": [asdict(row) for row in rows], "exponents": [asdict(e) for e in exponents(rows)],
        **outcome.extra,
    }  # fmt: skip


def write(report: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())


def load(path: Path) -> dict[str, Any] | None:
    """A kept report, or None where nothing was measured yet."""
    return json.loads(path.read_text()) if path.exists() else None


def files(folder: Path, suite: str) -> list[Path]:
    """The suite's file, and those of parts that were measured in several slots (``ops-1.json``)."""
    return sorted([*folder.glob(f"{suite}.json"), *folder.glob(f"{suite}-[0-9]*.json")])


def load_suite(folder: Path, suite: str) -> dict[str, Any] | None:
    """The suite's report, its parts joined; None where nothing was measured yet.

    What several parts measured (each has the row that the others are compared with) is taken from the first that has a ratio,
    else a value. Ratios stay within a part: only there were both sides measured in one run.

    Raises:
        ValueError: parts of several devices or commits.
    """
    reports = [json.loads(path.read_text()) for path in files(folder, suite)]
    if not reports:
        return None
    for key in ("device", "commit"):
        if len(found := {report["machine"].get(key) for report in reports}) > 1:
            raise ValueError(
                f"{folder}/{suite}*.json: parts of several: {key} is {' and '.join(sorted(map(str, found)))}"
            )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for report in reports for row in report["results"]):
        key = row["case"], row["provider"]
        if key not in rows or _worth(row) > _worth(rows[key]):
            rows[key] = row
    return {
        **reports[0], "results": [*rows.values()],
        "exponents": [row for report in reports for row in report["exponents"]],
    }  # fmt: skip


def _worth(row: Mapping[str, Any]) -> tuple[bool, bool]:
    return row["ratio"] is not None, row["problem"] is None


def rows_of(report: Mapping[str, Any]) -> list[Result]:
    return [Result(**row) for row in report["results"]]


def regressions(new: Sequence[Result], kept: Sequence[Result], tolerance: float = 0.25) -> list[str]:
    """Where tppo_fast's ratio to the baseline of the same run fell by more than ``tolerance``: a sentence each.

    Ratios alone are compared: seconds belong to one machine. A row that was measured and no longer is, is one too.
    """
    now = {(row.case, row.provider): row for row in new}
    found = []
    for old in kept:
        if old.ratio is None or not old.provider.startswith("tppo_fast"):
            continue
        row = now.get((old.case, old.provider))
        if row is None or row.ratio is None:
            why = row.problem if row is not None and row.problem else "was not measured"
            found.append(f"{old.case}, {old.provider}: {why}, and was {old.ratio:.2f}x")
        elif row.ratio < (1 - tolerance) * old.ratio:
            found.append(f"{row.case}, {row.provider}: {row.ratio:.2f}x the baseline, and was {old.ratio:.2f}x")
    return found
