"""What is read out of results: ratios, growth laws, regressions; and tables and plots are those of the kept files."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tppo_fast.errors import UserError

providers = pytest.importorskip("benchmarks.providers")
from benchmarks import __main__ as runner  # noqa: E402
from benchmarks import plots, results, tables  # noqa: E402
from benchmarks.results import Options, Outcome, Result  # noqa: E402

DRIVER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
if request["fail"]:
    sys.exit("no such kernel")
from safetensors.numpy import load_file
total = float(load_file(folder / "inputs.safetensors")["x"].sum())
(folder / "answer.json").write_text(json.dumps({"total": total, "threads": __import__("os").environ["OMP_NUM_THREADS"]}))
"""


def row(provider: str, values: list[float], case: str = "c", unit: str = "s", **others: Any) -> Result:
    return Result(case=case, provider=provider, values=values, unit=unit, baseline=provider == "torch eager", **others)


def test_ratios_say_how_many_times_better_whatever_the_unit() -> None:
    rows = [row("torch eager", [4.0, 2.0, 9.0]), row("tppo_fast", [1.0, 2.0, 3.0])]
    rates = [row("torch eager", [10.0], "r", "tokens/s"), row("tppo_fast", [30.0], "r", "tokens/s")]
    results.summarise([*rows, *rates])
    assert (rows[0].median, rows[0].ratio, rows[1].ratio) == (4.0, 1.0, 2.0)
    assert rates[1].ratio == 3.0
    assert (rows[1].q20, rows[1].q80) == (1.0, 3.0)


def test_a_growth_law_is_found_and_two_sizes_are_none() -> None:
    rows = [
        row("tppo_fast", [n**1.5], f"{n}", family="f", sizes={"tokens": n, "vocabulary": 7}) for n in (10, 100, 1000)
    ]
    rows.append(row("tppo_fast", [5.0], "14", family="f", sizes={"tokens": 10, "vocabulary": 14}))
    results.summarise(rows)
    (found,) = results.exponents(rows)
    assert (found.axis, found.fixed, found.sizes) == ("tokens", {"vocabulary": 7}, [10, 100, 1000])
    assert math.isclose(found.power, 1.5, rel_tol=1e-9)


def test_a_regression_is_a_fallen_ratio_or_a_row_that_is_gone() -> None:
    old = [row("torch eager", [4.0]), row("tppo_fast: a", [1.0]), row("tppo_fast: b", [1.0])]
    slower_machine = [row("torch eager", [8.0]), row("tppo_fast: a", [2.1]), row("tppo_fast: b", [2.0])]
    worse = [row("torch eager", [4.0]), row("tppo_fast: a", [2.0]), row("tppo_fast: b", [], problem="it disagrees")]
    gone = worse[:2]
    for rows in (old, slower_machine, worse):
        results.summarise(rows)
    assert results.regressions(slower_machine, old) == []
    first, second = results.regressions(worse, old)
    assert "2.00x the baseline, and was 4.00x" in first
    assert "it disagrees" in second
    assert "was not measured, and was 4.00x" in results.regressions(gone, old)[1]


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    rows = [row("torch eager", [4.0]), row("tppo_fast", [1.0]), row("QuACK", [], problem="it needs a GPU")]
    results.summarise(rows)
    report = results.report("ops", "command", Options(), Outcome(results=rows), {"providers": {}, "machine": {}})
    results.write(report, tmp_path / "ops-1.json")
    results.write({**report, "results": report["results"][:1]}, tmp_path / "ops-2.json")
    joined = results.load_suite(tmp_path, "ops")
    assert joined is not None
    assert results.rows_of(joined) == rows
    bare = [{**row, "ratio": None} for row in report["results"]]  # of a part without the baseline
    failed = [{**row, "problem": "out of memory"} for row in bare]
    for name, part in (("ops-1.json", failed), ("ops-2.json", bare)):
        results.write({**report, "results": part}, tmp_path / name)
    kept = results.rows_of(results.load_suite(tmp_path, "ops") or {})
    assert [row.problem for row in kept] == [None, None, "out of memory"]
    results.write(report, tmp_path / "ops-1.json")
    results.write({**report, "results": bare}, tmp_path / "ops-0.json")
    assert results.rows_of(results.load_suite(tmp_path, "ops") or {}) == rows
    results.write({**report, "machine": {"commit": "another"}}, tmp_path / "ops-2.json")
    with pytest.raises(ValueError, match=r"parts of several: commit is None and another"):
        results.load_suite(tmp_path, "ops")
    assert "Not timed (it needs a GPU): QuACK." in tables.blocks([rows])


def test_generated_texts_are_those_of_the_kept_results() -> None:
    for path, text in tables.documents().items():
        assert path.read_text() == text, f"{path.name} is stale: python -m benchmarks.tables"


@pytest.mark.parametrize("plot", plots.planned(), ids=lambda plot: "-".join(plot.path.parts[-2:]))
def test_plots_are_drawn_from_the_kept_results(plot: plots.Plot) -> None:
    """By the hash that each carries; a changed byte of a result makes its plot stale."""
    assert plot.path.exists(), "python -m benchmarks.tables"
    assert plots.embedded(plot.path.read_bytes()) == plots.digest(plot.sources), "stale: python -m benchmarks.tables"


def test_a_plot_carries_the_hash_of_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    rows = [
        row(name, [n * k, n * k * 1.1], f"{n}", family="GAE, fp32", sizes={"tokens": n})
        for name, k in (("tppo_fast: native", 1.0), ("padded PyTorch: blocked", 4.0), ("torch eager", 9.0))
        for n in (10, 100, 1000)
    ]
    results.summarise(rows)
    machine = {"device": "CPU", "cpu": "c", "simd": "avx2", "torch": "2", "commit": "abc", "date": "2026-01-01"}
    record = {"machine": machine, "providers": {"verl": {"version": "1", "missing": None}}}
    results.write(
        results.report("ops", "bench", Options(), Outcome(results=rows), record), tmp_path / "cpu" / "ops.json"
    )
    found = {plot.path.name: plot for plot in plots.planned()}
    svg = found["ops.svg"].svg()
    assert svg == found["ops.svg"].svg()  # drawn again, the same bytes
    assert plots.embedded(svg) == plots.digest([tmp_path / "cpu" / "ops.json"])
    assert plots.embedded(found["summary.svg"].svg()) == plots.embedded(svg)
    assert b"GAE, against a loop" in found["summary.svg"].svg()
    assert "| native: 10.50 s | padded PyTorch: blocked: 42.00 s | 4.00x | 4.00x - 4.00x |" in tables.summary()
    assert "not measured yet" in tables.summary()  # the other suites, and every GPU


def highlights(rows: list[Result]) -> list[str]:
    """The lines of the README's table, without sizes."""
    results.summarise(rows)
    return [line for cases in tables.whole(tables.families(rows)) for line in tables._highlights(cases)]


def test_a_rollout_is_compared_like_for_like_first() -> None:
    rates = {"tppo_fast: vLLM": 120.0, "tppo_fast: transformers": 60.0, "TRL": 48.0}
    first, second = highlights([row(name, [rate], unit="tokens/s") for name, rate in rates.items()])
    assert "| transformers: 60 tokens/s | TRL: 48 tokens/s | ~ 1.25x |" in first
    assert "| vLLM: 120 tokens/s | TRL: 48 tokens/s | ~ 2.50x |" in second


def test_a_step_is_highlighted_with_a_critic_of_its_own_and_the_leaner_setting_of_the_other() -> None:
    memory = {"tppo_fast: shared body": 3, "tppo_fast: own critic": 5, "TRL PPO": 17, "TRL PPO: one response a pass": 6}
    seconds = [1.0, 2.0, 8.0, 9.0]
    rows = [row(n, [s], host_peak_bytes=m * 2**30) for s, (n, m) in zip(seconds, memory.items(), strict=True)]
    assert highlights(rows) == [
        "| c | own critic: 2.00 s, 5.00 GiB | TRL PPO: 8.00 s, 17.00 GiB; TRL PPO: one response a pass: 9.00 s, 6.00 GiB "
        "| ~ 4.00x |  |"
    ]
    assert (
        "9.00 s"
        not in highlights([*rows[:3], row("TRL PPO: one response a pass", [9.0], host_peak_bytes=16 * 2**30)])[0]
    )


def test_gae_is_never_highlighted_against_a_loop() -> None:
    gae = {"case": "GAE, fp32: 9 tokens", "family": "GAE, fp32"}
    rows = [row("tppo_fast: triton", [1.0], **gae), row("padded PyTorch", [900.0], **gae)]
    failed = row("padded PyTorch: blocked", [], problem="out of memory", **gae)
    assert highlights(rows) == highlights([*rows, failed]) == []
    (line,) = highlights([*rows, row("padded PyTorch: blocked", [3.0], **gae)])
    assert "blocked: 3.00 s | ~ 3.00x |" in line


def test_learning_says_what_its_rows_are_worth() -> None:
    rows = [
        row("tppo_fast: TPPO", [1280, 1280], unit="responses"),
        row("tppo_fast: sentence PPO", [], unit="responses", problem="1 of 2 seeds never reached it"),
        row("tppo_fast: GRPO", [1280, 4480], unit="responses"),
    ]
    assert tables.learning_note(rows, [3, 4]) == (
        "What the gain counts from was chosen after curves were known; 2 seeds; in seed 3 GRPO needed 1,280 responses and "
        "TPPO 1,280."
    )
    report = tables.kept("cpu")["learning"]
    assert "Providers: ." not in tables.full(report)
    assert "`; each run of it has one thread" in tables.full(report)
    assert "held-out relevance" not in tables.summary()


def test_a_driver_is_asked_through_files(tmp_path: Path) -> None:
    import torch

    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    python = Path(sys.executable)
    folder, tensors = tmp_path / "talk", {"x": torch.ones(3)}
    answer = providers.ask(python, str(driver), folder, {"fail": False}, tensors, threads=1)
    assert answer == {"total": 3.0, "threads": "1"}
    with pytest.raises(RuntimeError, match="no such kernel"):
        providers.ask(python, str(driver), folder, {"fail": True}, tensors)


def test_a_provider_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match="no provider is called that"):
        providers.chosen("ops", ["verl", "nonsense"])
    assert [p.name for p in providers.chosen("learning", None)] == ["tppo_fast"]
    assert CliRunner().invoke(runner.main, ["--suite", "nonsense"]).exit_code == 2
    assert CliRunner().invoke(runner.main, ["--providers", "nonsense"]).exit_code == 2
    assert CliRunner().invoke(runner.main, ["--suite", "rollout", "--model", "nowhere"]).exit_code == 2
    assert CliRunner().invoke(runner.main, ["--suite", "learning", "--providers", "verl"]).exit_code == 2


def test_help_needs_no_torch() -> None:
    code = "import sys, benchmarks.__main__, benchmarks.tables, benchmarks.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
