"""Tables and plots of the kept results: ``python -m benchmarks.tables`` writes them; a test fails when one is stale.

The root README gets one table and one plot, ``kernels/README.md`` the ops at their first sizes, ``RESULTS.md`` everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.providers import SUITES
from benchmarks.results import NOT_MEASURED, Result
from tppo_fast.atomic import write_atomic

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: written by python -m benchmarks.tables -->", "<!-- end of results -->"


def seconds(x: float) -> str:
    return f"{x:.2f} s" if x >= 1 else f"{x * 1e3:.1f} ms" if x >= 1e-3 else f"{x * 1e6:.0f} us"


def value(x: float, unit: str) -> str:
    """With its unit."""
    if unit == "s":
        return seconds(x)
    if unit == "MFU":
        return f"{x:.1%}"
    return f"{x:.3f}" if unit == "relevance" else f"{x:,.0f} {unit}" if x < 1e7 else f"{x:.3g} {unit}"


def times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.2f}x"


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def caption(report: Mapping[str, Any]) -> str:
    """Device, libraries, commit and command, on one line."""
    machine = report["machine"]
    model = report["settings"].get("model")
    what = f"{_device(report)}{f', {model}' if model else ''}"
    threads = "; each run of it has one thread, whatever `--threads` says" if report["suite"] == "learning" else ""
    return f"{what}, commit {machine['commit']}, {machine['date']}: `{report['command']}`{threads}"


def _device(report: Mapping[str, Any]) -> str:
    machine, threads = report["machine"], int(report["settings"]["threads"])
    cpu = f"{machine['cpu']} ({machine['simd']}), {threads} thread{'s' if threads != 1 else ''}"
    return f"{cpu if machine['device'].startswith('CPU') else machine['device']}, torch {machine['torch']}"


def by_case(rows: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def families(rows: Sequence[Result]) -> list[list[list[Result]]]:
    """The cases of each family, its usual size first."""
    found: dict[str, list[list[Result]]] = {}
    for case, members in by_case(rows).items():
        found.setdefault(members[0].family or case, []).append(members)
    return list(found.values())


def blocks(cases: Sequence[Sequence[Result]]) -> str:
    """A table for each case, and below it who was not timed and why (once for all sizes)."""
    parts: list[str] = []
    said: set[tuple[str, str, str | None]] = set()
    for rows in cases:
        parts.append(f"**{rows[0].case}**")
        if measured := [_columns(row) for row in rows if row.median is not None]:
            parts.append(_table(measured))
        reasons: dict[str, list[str]] = {}
        for row in rows:
            why = (row.family or row.case, row.provider, row.problem)
            if row.median is None and why not in said:
                said.add(why)
                reasons.setdefault(row.problem or "not measured", []).append(row.provider)
        parts += [f"Not timed ({reason}): {'; '.join(names)}." for reason, names in reasons.items()]
    return "\n\n".join(parts)


def _columns(row: Result) -> dict[str, str]:
    turns, spread = len(row.values), (row.q20 or 0.0, row.q80 or 0.0)
    return {
        "provider": row.provider,
        "median": value(row.median or 0.0, row.unit),
        "20-80 %": " - ".join(value(x, row.unit) for x in spread) if turns > 1 else "",
        "turns": str(turns) if turns > 1 else "",
        "ratio": times(row.ratio) if row.ratio else "",
        "of the ceiling": f"{row.share_of_ceiling:.0%}" if row.share_of_ceiling else "",
        "peak memory": size(_memory(row)),
    }


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Without the columns that are empty in every row."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def exponents(report: Mapping[str, Any]) -> str:
    """The fitted growth laws."""
    if not report["exponents"]:
        return ""
    lines = ["| what | provider | grows with | sizes | power |", "|---|---|---|---|---|"]
    for e in report["exponents"]:
        sizes = ", ".join(f"{n:,}" for n in e["sizes"])
        lines.append(
            f"| {e['family']} | {e['provider']} | {e['axis']} | {sizes} | {e['power']:.2f} +- {e['stderr']:.2f} |"
        )
    return "\n".join(lines)


def full(report: Mapping[str, Any]) -> str:
    """A suite's whole report."""
    rows = results.rows_of(report)
    absent = [f"- {name}: {p['missing']}" for name, p in report["providers"].items() if p["missing"]]
    versions = ", ".join(f"{name} {p['version']}" for name, p in report["providers"].items() if p["version"])
    about = f"{caption(report)}.{f' Providers: {versions}.' if versions else ''}"
    parts = [about, blocks(list(by_case(rows).values()))]
    if report["suite"] == "learning":
        parts.append(learning_note(rows, report["settings"]["seeds"]))
    if note := report.get("note"):
        parts.append(note)
    if left := report["settings"].get("skipped_cases"):
        parts.append(f"{left} cases were left out: the time was over.")
    if absent:
        parts.append("Not here:\n\n" + "\n".join(absent))
    if growth := exponents(report):
        parts.append("Growth, fitted (median ~ size ^ power):\n\n" + growth)
    return "\n\n".join(parts)


def learning_note(rows: Sequence[Result], seeds: Sequence[int]) -> str:
    """What the rows of the learning suite are worth, and the seeds in which another method needed no more than ours."""
    ours, *others = next(iter(by_case(rows).values()))
    ties = [
        f"in seed {seed} {row.provider.partition(': ')[2]} needed {theirs:,.0f} responses and "
        f"{ours.provider.partition(': ')[2]} {mine:,.0f}"
        for row in others for seed, mine, theirs in zip(seeds, ours.values, row.values, strict=False) if theirs <= mine
    ]  # fmt: skip
    return (
        "; ".join(["What the gain counts from was chosen after curves were known", f"{len(seeds)} seeds", *ties]) + "."
    )


def kept(device: str) -> dict[str, dict[str, Any]]:
    """Suite -> its kept report."""
    found = {suite: results.load_suite(results.ROOT / device, suite) for suite in SUITES}
    return {suite: report for suite, report in found.items() if report is not None}


def gpus() -> list[str]:
    """The folders of results that a GPU left."""
    return sorted(
        path.name
        for path in results.ROOT.iterdir()
        if path.is_dir() and path.name not in ("cpu", "aot") and kept(path.name)
    )


def is_ours(row: Result) -> bool:
    return row.provider.startswith("tppo_fast")


def best_other(rows: Sequence[Result]) -> Result | None:
    """The best measured row beside ours: of another provider, or of another method where all are ours."""
    others = [row for row in rows if not is_ours(row)] or rows[1:]
    measured = [row for row in others if row.median is not None]
    if not measured:
        return None
    pick = max if results.more_is_better(measured[0].unit) else min
    return pick(measured, key=lambda row: row.median or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """Ours, the first of our rows, beside the best other one of a case."""

    ours: Result
    other: Result | None
    ratio: float | None
    """How many times better ours is."""
    told_apart: bool
    """The 20 to 80 % bands of the two do not overlap."""


def against(rows: Sequence[Result], provider: str | None = None) -> Against:
    """Ours, the first of our rows or the one of this name, beside the best other."""
    mine = [row for row in rows if row.provider == provider] or [row for row in rows if is_ours(row)] or rows
    ours, other = mine[0], best_other(rows)
    if other is None or not ours.median or not other.median:
        return Against(ours=ours, other=other, ratio=None, told_apart=False)
    apart = min(len(ours.values), len(other.values)) > 1 and (
        (ours.q80 or 0.0) < (other.q20 or 0.0) or (other.q80 or 0.0) < (ours.q20 or 0.0)
    )
    more = results.more_is_better(ours.unit)
    return Against(
        ours=ours,
        other=other,
        ratio=ours.median / other.median if more else other.median / ours.median,
        told_apart=apart,
    )


def _memory(row: Result) -> int | None:
    return row.device_peak_bytes if row.device_peak_bytes is not None else row.host_peak_bytes


def _cell(row: Result | None) -> str:
    if row is None or row.median is None:
        return NOT_MEASURED if row is None or not row.problem else row.problem
    memory = _memory(row)
    name = row.provider.removeprefix("tppo_fast: ")
    return f"{name}: {value(row.median, row.unit)}{f', {size(memory)}' if memory and row.unit == 's' else ''}"


def _leaner(rows: Sequence[Result], other: Result) -> Result | None:
    """Of the other's rows the one that takes less memory than its fastest, by a fifth or more, where that is over 1 GiB."""
    same = [row for row in rows if row.median and row.provider.split(":")[0] == other.provider.split(":")[0]]
    least = min(same, key=lambda row: _memory(row) or 0)
    most = _memory(other) or 0
    return least if most > 2**30 and (_memory(least) or 0) < 0.8 * most else None


def summary() -> str:
    """The tables of the README's first screen."""
    parts, measured = ["![Ops, one PPO step and learning, against the peers](benchmarks/results/summary.svg)"], []
    for device in ("cpu", *gpus()):
        reports = kept(device)
        measured += reports.values()
        lines = [f"| {device.upper()} | tppo_fast | best other | ratio | other sizes |", "|---|---|---|---|---|"]
        for suite in HIGHLIGHTS:
            if suite in reports:
                lines += [
                    line for cases in whole(families(results.rows_of(reports[suite]))) for line in _highlights(cases)
                ]
            elif device == "cpu":
                lines.append(f"| {suite} | {NOT_MEASURED} | {NOT_MEASURED} | | |")
        parts.append("\n".join(lines))
    if not gpus():
        parts.append(f"GPU: {NOT_MEASURED}.")
    devices = dict.fromkeys(_device(report) for report in measured)
    commits = dict.fromkeys(report["machine"]["commit"] for report in measured)
    models = dict.fromkeys(report["settings"]["model"] for report in measured if "model" in report["settings"])
    note = (
        f"{'; '.join(devices)}; {', '.join(models) or 'no model'}; commit {', '.join(commits)}"
        if measured
        else NOT_MEASURED
    )
    parts.append(
        f"<sub>`make bench` (GPU: `make gpu-check`): {note}. All rows: [RESULTS](benchmarks/RESULTS.md).</sub>\n\n"
        "- *Best other*: the fastest provider that passed the same run's correctness gate; beside it, where that takes GiB, "
        "its row that needs less. *~*: the 20 to 80 % bands of the two overlap. *Memory*: an op's peak beyond its inputs, a "
        "step's whole process.\n"
        "- PPO and GRPO iterations on the CPU sample with transformers' generate on both sides; in ours the samples of a prompt "
        "share its prefill. Rollouts: through transformers on both sides, then ours through vLLM.\n"
        "- The GPU's PPO step leaves sampling out. TRL learns there from what it samples itself, so the correctness gate does "
        f"not apply{'; one body for policy and critic is compared with two' if _one_body_on_gpus() else ''}."
    )
    return "\n\n".join(parts)


HIGHLIGHTS = ("ops", "rollout", "step")
"""Suites of the root README's table. Learning stands in ``RESULTS.md`` alone: two seeds, and a rule that followed the curves."""
LIKE_FOR_LIKE = ("tppo_fast: transformers", "tppo_fast: own critic")
"""Our rows that do what the others do; a case that has one shows it first."""
LOOPS = {"GAE, fp32": "padded PyTorch: blocked"}
"""Ops whose other rows loop over time in Python -> the row without which they are no comparison."""


def _highlights(cases: Sequence[Sequence[Result]]) -> list[str]:
    """A family's lines: ours like for like, and what vLLM makes of a rollout; none for an op against a loop over time."""
    family, names = cases[0][0].family, {row.provider for row in cases[0] if row.median}
    if family in LOOPS and LOOPS[family] not in names:
        return []
    fair = next((name for name in LIKE_FOR_LIKE if name in names), None)
    second = ["tppo_fast: vLLM"] if "tppo_fast: vLLM" in names else []
    return [_summary_line(cases, name) for name in (fair, *second)]


def _one_body_on_gpus() -> bool:
    """Whether a GPU's step has no row with a critic of its own."""
    rows = [row for device in gpus() for row in results.rows_of(kept(device).get("step", {"results": []}))]
    return bool(rows) and "tppo_fast: own critic" not in {row.provider for row in rows if row.median}


def whole(found: Sequence[list[list[Result]]]) -> list[list[list[Result]]]:
    """Without the phases of another case, and without those where only our own variants are compared."""
    names = {cases[0][0].family for cases in found}
    return [
        cases for cases in found
        if not any(cases[0][0].family.startswith(f"{name}, ") for name in names if name)
        and not all(map(is_ours, cases[0]))
    ]  # fmt: skip


def _summary_line(cases: Sequence[Sequence[Result]], provider: str | None) -> str:
    first, *others = (against(rows, provider) for rows in cases)
    beside = next((f"none: {row.problem}" for row in cases[0][1:] if row.problem), "none")
    ratios = sorted(case.ratio for case in others if case.ratio and case.ours.sizes != first.ours.sizes)
    elsewhere = f"{times(ratios[0])} - {times(ratios[-1])}" if ratios else ""
    ratio = f"{'' if first.told_apart else '~ '}{times(first.ratio)}" if first.ratio else ""
    other = _cell(first.other) if first.other else beside
    if first.other and (leaner := _leaner(cases[0], first.other)):
        other += f"; {_cell(leaner)}"
    return f"| {first.ours.case} | {_cell(first.ours)} | {other} | {ratio} | {elsewhere} |"


def kernels() -> str:
    """The table of ``kernels/README.md``: the ops at their usual sizes, per device."""
    parts = []
    for device in ("cpu", *gpus()):
        report = kept(device).get("ops")
        usual = [cases[0] for cases in families(results.rows_of(report))] if report else []
        parts.append(f"{caption(report)}.\n\n{blocks(usual)}" if report else f"CPU: {NOT_MEASURED}.")
    if not gpus():
        parts.append(f"GPU: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def everything() -> str:
    """``RESULTS.md``."""
    how = "Written by `python -m benchmarks.tables` from the JSON beside it; how they are made: [README](README.md)."
    parts = ["# Results", how]
    for device in ("cpu", *gpus()):
        for suite in SUITES:
            report = kept(device).get(suite)
            parts.append(f"## {device}: {suite}")
            if report is None:
                parts.append(f"{NOT_MEASURED.capitalize()}.")
                continue
            parts += [f"![{suite}](results/{device}/{suite}.svg)", full(report)]
    if not gpus():
        parts.append(f"## GPU\n\n{NOT_MEASURED.capitalize()}.")
    return "\n\n".join(parts) + "\n"


def between(text: str, inner: str) -> str:
    """The text with ``inner`` between its marks."""
    before, rest = text.split(START)
    return f"{before}{START}\n{inner}\n{END}{rest.split(END)[1]}"


def documents() -> dict[Path, str]:
    """Every generated text, as it should be."""
    readme, kernels_readme = ROOT / "README.md", ROOT / "kernels" / "README.md"
    return {
        readme: between(readme.read_text(), summary()),
        kernels_readme: between(kernels_readme.read_text(), kernels()),
        Path(__file__).parent / "RESULTS.md": everything(),
    }


def main() -> None:
    """Write all of them, and the plots."""
    from benchmarks import plots

    for path, text in documents().items():
        write_atomic(path, text.encode())
    for plot in plots.planned():
        write_atomic(plot.path, plot.svg())


if __name__ == "__main__":
    main()
