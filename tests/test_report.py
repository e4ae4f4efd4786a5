"""The report is one safe, self-contained page that says what the numbers say and no more."""

from __future__ import annotations

import base64
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tppo_fast import report as report_module
from tppo_fast.errors import UserError
from tppo_fast.estimates import Difference, Estimate
from tppo_fast.report import (
    CURVES,
    Curve,
    Example,
    Report,
    Run,
    draw,
    machine_record,
    phase_means,
    verdict,
    write_report,
)

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/p onerror=alert(1)>\"'&{{ 7*7 }}"
MACHINE = {"python": "3.11", "commit": "unknown"}


class Page(HTMLParser):
    """Tags with attributes, and the text outside <style>."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags must nest"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def rows(steps: int = 6, *, relevance: float = 0.25) -> list[Mapping[str, float | None]]:
    made: list[Mapping[str, float | None]] = [
        {"step": 0, "eval/relevance": relevance, "eval/relevance_low": 0.2, "eval/relevance_high": 0.3}
    ]
    for step in range(1, steps):
        made.append({"step": step, "rollout/reward_per_token": 0.1 * step, "ppo/kl": 0.01, "rollout/length_mean": 14.0})
    made.append({"step": steps, "eval/relevance": 0.4, "eval/relevance_low": 0.35, "eval/relevance_high": 0.45})
    return made


def full() -> Report:
    return Report(
        title="TPPO on search sessions",
        verdict=verdict("TPPO", "start", 0.1, 0.05, 0.15, "eval/relevance"),
        command="tppo-fast demo --seed 0",
        settings={"seed": 0, "ppo": {"lr": 1e-5, "deep": {"er": None}}},
        runs=[
            Run(name="TPPO", rows=rows(), samples_per_step=64),
            Run(name="sentence", rows=rows(), samples_per_step=64),
        ],
        table={
            "start": {"eval/relevance": Estimate(mean=0.25, low=0.21, high=0.29), "eval/hit": Estimate(mean=0.5)},
            "TPPO": {
                "eval/relevance": Estimate(mean=0.4123, low=0.38, high=math.nan),
                "eval/length": Estimate(mean=14.2),
            },
        },
        examples=[Example(caption="History: paris", tokens=[(" paris", 2, 1.0), (",", 0, 0.0), (" dog\n", 1, -0.88)])],
        machine=MACHINE,
    )


# ---------------------------------------------------------------- the page


def test_everything_is_said(tmp_path: Path):
    write_report(tmp_path / "report.html", full())
    page = Page(tmp_path / "report.html")
    assert page.open == []
    text = " ".join(page.text.split())
    for expected in (
        "TPPO on search sessions", "TPPO is above start on held-out relevance by 0.100", "0.250 [0.210, 0.290]",
        "tppo-fast demo --seed 0", "ppo.lr 1e-05", "ppo.deep.er None", "python 3.11", "History: paris",
        "method held-out relevance hit rate response length (tokens)", "TPPO 0.412 - 14.2",
        "start 0.250 [0.210, 0.290] 0.500 -",
    ):  # fmt: skip
        assert expected in text
    assert "users are few" not in text
    few = {"start": {"eval/hit": Estimate(mean=0.1, low=0.0, high=0.2, users=12)}}
    write_report(tmp_path / "few.html", replace(full(), table=few))
    assert "12 users are few" in Page(tmp_path / "few.html").text


def test_differences_from_the_baseline_that_survive_correction_are_starred(tmp_path: Path):
    gaps = {
        "PPO": {"eval/hit": Difference(mean=0.1, low=0.05, high=0.15, users=40, p=0.01)},
        "GRPO": {"eval/hit": Difference(mean=0.1, low=0.01, high=0.19, users=40, p=0.08)},
    }
    write_report(tmp_path / "report.html", replace(full(), baseline="TPPO", differences=gaps))
    text = " ".join(Page(tmp_path / "report.html").text.split())
    assert "TPPO against each TPPO minus hit rate PPO 0.100* [0.050, 0.150] GRPO 0.100 [0.010, 0.190]" in text


def test_the_time_of_each_phase_is_averaged_over_the_steps(tmp_path: Path):
    logged = [{"step": 1, "time/rollout": 1.0, "time/sync": 0.25}, {"step": 2, "time/rollout": 2.0, "time/sync": None}]
    run = Run(name="r", rows=logged, samples_per_step=1)
    assert phase_means(run) == {"time/rollout": 1.5, "time/sync": 0.25}
    write_report(tmp_path / "r.html", replace(full(), runs=[run]))
    page = (tmp_path / "r.html").read_text()
    assert "Where the time goes" in page
    assert "<td>1.5" in page


def test_the_page_needs_nothing_else(tmp_path: Path):
    written = write_report(tmp_path / "report.html", full())
    page = Page(tmp_path / "report.html")
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == len(CURVES)
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    beside = [path for path in written if path.suffix == ".png"]
    assert [path.name for path in beside] == [f"report-{curve.slug}.png" for curve in CURVES]
    assert embedded == [path.read_bytes() for path in beside]
    assert all(png.startswith(b"\x89PNG") for png in embedded)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    style = re.findall(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)[0]
    assert "url(" not in style
    assert "@import" not in style
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_hostile_text_stays_text_everywhere(tmp_path: Path):
    hostile = Report(
        title=HOSTILE, verdict=HOSTILE, command=HOSTILE, settings={HOSTILE: {"x": HOSTILE}},
        runs=[Run(name=HOSTILE, rows=rows(), samples_per_step=1)],
        table={HOSTILE: {HOSTILE: Estimate(mean=1.0)}},
        examples=[Example(caption=HOSTILE, tokens=[(HOSTILE, 2, 1.0)])], machine={HOSTILE: HOSTILE},
    )  # fmt: skip
    write_report(tmp_path / "report.html", hostile)
    write_report(tmp_path / "harmless.html", replace(full(), runs=hostile.runs[:1]))
    page = Page(tmp_path / "report.html")
    known = {tag for tag, _ in Page(tmp_path / "harmless.html").tags}
    assert {tag for tag, _ in page.tags} <= known
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert all((attrs["src"] or "").startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert page.text.count(HOSTILE) >= 9


def test_odd_tokens_are_made_visible(tmp_path: Path):
    tokens = [("a\nb\t", 2, 1.0), ("\x00\x1b[31m", 1, -1.0), ("\ud800", 1, -1.0), ("日本 é", 2, 1.0), ("", 0, math.nan)]
    write_report(
        tmp_path / "r.html", replace(full(), runs=(), examples=[Example(caption="half \ud83d", tokens=tokens)])
    )
    content = (tmp_path / "r.html").read_text(encoding="utf-8")
    for shown in ("a↵b⇥", "\\x00\\x1b[31m", "\\ud800", "日本 é"):
        assert shown in content
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", content)


def test_a_class_is_told_by_more_than_its_colour(tmp_path: Path):
    write_report(tmp_path / "r.html", replace(full(), runs=()))
    style = (tmp_path / "r.html").read_text()
    lines = {re.search(rf"\.class-{c} > span {{[^}}]*border-bottom: 3px (\w+)", style)[1] for c in (0, 1, 2)}  # type: ignore[index]
    assert len(lines) == 3
    titles = [a["title"] for tag, a in Page(tmp_path / "r.html").tags if tag == "span" and "title" in a]
    assert titles == ["class 2, reward 1.000", "class 0, reward 0.000", "class 1, reward -0.880"]


def test_an_empty_report_is_still_a_page(tmp_path: Path):
    empty = Report(title="t", verdict="v", command="c", settings={}, machine=MACHINE)
    assert write_report(tmp_path / "new" / "r.html", empty) == [tmp_path / "new" / "r.html"]
    assert Page(tmp_path / "new" / "r.html").open == []


def test_a_curve_that_was_not_recorded_is_named(tmp_path: Path):
    run = Run(name="a", rows=[{"step": 1, "ppo/kl": 0.1}], samples_per_step=8)
    written = write_report(tmp_path / "r.html", replace(full(), runs=[run]))
    assert [path.name for path in written] == ["r-kl.png", "r.html"]
    assert (
        "Not recorded in these runs: reward per token, held-out relevance, response length"
        in Page(tmp_path / "r.html").text
    )


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file" / "r.html", full())


# ---------------------------------------------------------------- the curves


def test_curves_count_samples_and_show_the_confidence_band():
    curve = next(c for c in CURVES if c.band)
    axes = draw(curve, full().runs[:1]).axes[0]
    assert list(axes.lines[0].get_xdata()) == [0.0, 6 * 64.0]  # type: ignore[arg-type]
    assert list(axes.lines[0].get_ydata()) == [0.25, 0.4]  # type: ignore[arg-type]
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}  # type: ignore[union-attr]
    assert {(0.0, 0.2), (0.0, 0.3), (384.0, 0.35), (384.0, 0.45)} <= corners


def test_seeds_of_one_method_are_one_line_with_a_band():
    def run(name: str, *values: float | None) -> Run:
        return Run(name=name, rows=[{"step": i, "ppo/kl": v} for i, v in enumerate(values)], samples_per_step=2)

    runs = [run("a", 1.0, 2.0, None), run("b", 5.0, 6.0), run("a", 3.0, 6.0, 7.0), run("a", 2.0)]
    figure = draw(Curve("kl", "ppo/kl"), runs)
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    a, b = (next(line for line in axes.lines if line.get_label() == name) for name in "ab")
    assert a.get_color() != b.get_color()
    assert list(a.get_xdata()) == [0.0, 2.0, 4.0]  # type: ignore[arg-type]
    assert list(a.get_ydata())[:2] == [2.0, 4.0]  # type: ignore[arg-type]
    assert math.isnan(list(a.get_ydata())[2])  # type: ignore[arg-type]
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}  # type: ignore[union-attr]
    assert {(0.0, 1.0), (0.0, 3.0), (2.0, 2.0), (2.0, 6.0)} <= corners
    assert "3 seeds" in axes.get_xlabel()


def test_the_legend_shows_every_name_as_it_is_written(tmp_path: Path):
    names = [r"a $\foo{ b$", "_hidden", "$x^2$"]
    runs = [Run(name=name, rows=[{"step": 1, "ppo/kl": 0.1}], samples_per_step=8) for name in names]
    legend = draw(Curve("kl", "ppo/kl"), runs).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert not any(text.get_parse_math() for text in legend.get_texts())
    write_report(tmp_path / "r.html", replace(full(), runs=runs))


def test_many_methods_have_their_legend_beside_the_curves():
    figure = draw(
        Curve("kl", "ppo/kl"), [Run(name=n, rows=[{"step": 0, "ppo/kl": 1.0}], samples_per_step=1) for n in "abcde"]
    )
    assert figure.axes[0].get_legend() is None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list("abcde")


def test_a_value_that_was_not_finite_leaves_a_gap_and_long_curves_keep_their_raw_line():
    values = [{"step": step, "ppo/kl": None if step == 30 else float(step % 2)} for step in range(100)]
    raw, smooth = draw(Curve("kl", "ppo/kl"), [Run(name="a", rows=values, samples_per_step=1)]).axes[0].lines
    assert [math.isnan(y) for y in raw.get_ydata()] == [step == 30 for step in range(100)]  # type: ignore[union-attr]
    smoothed = list(smooth.get_ydata())  # type: ignore[arg-type]
    assert math.isnan(smoothed[30])
    assert smoothed[10] == 0.5  # steps 7 to 10: 1 0 1 0
    assert smoothed[31] == pytest.approx(2 / 3)  # steps 28, 29 and 31: 0 1 1, the gap left out


def test_drawing_leaves_no_pyplot_state(tmp_path: Path):
    write_report(tmp_path / "r.html", full())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


# ---------------------------------------------------------------- the verdict and the record


def test_verdict_in_plain_language():
    assert verdict("TPPO", "PPO", 0.042, 0.011, 0.073, "eval/relevance") == (
        "TPPO is above PPO on held-out relevance by 0.042 (95 % interval +0.011 to +0.073 for the difference)."
    )
    assert verdict("TPPO", "PPO", -0.042, -0.073, -0.011, "eval/copy") == (
        "TPPO is below PPO on copy by 0.042 (95 % interval -0.073 to -0.011 for the difference)."
    )
    for low, high in ((-0.01, 0.05), (0.0, 0.05), (-0.05, 0.0), (0.0, 0.0)):
        assert verdict("A", "B", 0.0, low, high, "eval/hit").startswith("No difference could be shown between A and B")
    assert verdict("A", "B", 0.1, 0.02, 0.18, "eval/judged", p=0.08) == (
        "No difference could be shown between A and B on share judged relevant: +0.100 (95 % interval +0.020 to +0.180), "
        "but p is 0.080 once corrected for the number of comparisons."
    )
    assert "for the difference, corrected p 0.012)" in verdict("A", "B", 0.1, 0.02, 0.18, "eval/hit", p=0.012)
    assert "corrected p below 0.001)" in verdict("A", "B", 0.1, 0.02, 0.18, "eval/hit", p=0.0)
    assert "contains zero" in verdict("A", "B", 0.1, -0.02, 0.18, "eval/hit", p=0.2)
    assert "could not be computed" in verdict("A", "B", math.nan, 0.1, 0.2, "eval/hit")
    with pytest.raises(ValueError, match="low must not be above high"):
        verdict("A", "B", 0.1, 0.2, 0.1, "eval/hit")


def test_machine_record_without_git_or_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = machine_record()
    assert record["torch"].startswith("2.")
    assert record["transformers"] != "not installed"
    assert int(record["threads"]) >= 1
    monkeypatch.setattr(report_module, "__file__", str(tmp_path / "report.py"))
    assert machine_record()["commit"] == "unknown"  # not in a repository
    monkeypatch.setenv("PATH", "")
    assert machine_record()["commit"] == "unknown"  # no git at all
