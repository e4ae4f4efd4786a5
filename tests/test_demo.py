"""The demo end to end, small: it finishes, reports, continues, and refuses to mix two demos."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tppo_fast import demo
from tppo_fast.errors import UserError


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> demo.DemoSettings:
    """A demo whose model cannot have learned anything, so that its verdict must say so."""
    chosen = demo.DemoSettings(
        run_dir=tmp_path_factory.mktemp("demo") / "d", model=str(tiny_model), sft_steps=2, steps=1, sessions=60
    )
    demo.run_demo(chosen)
    return chosen


def test_leaves_report_curves_and_policies(options: demo.DemoSettings) -> None:
    page = (options.run_dir / "report.html").read_text()
    assert "No difference could be shown" in page
    for curve in ("reward", "relevance", "kl", "length"):
        assert (options.run_dir / f"report-{curve}.png").stat().st_size > 1000
    assert page.count("Rewards of the tokens of") >= 3
    for method in ("tppo", "last-token-ppo"):
        AutoModelForCausalLM.from_pretrained(options.run_dir / method / "policy")


def test_again_takes_what_is_there(options: demo.DemoSettings, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in options.run_dir.rglob("model.safetensors")}
    table = demo.run_demo(options)
    assert list(table)[-3:] == ["start", "TPPO", "last-token PPO"]
    assert table["exact Bayes, whole history"]["relevance"].mean > 0.8
    assert table["copy the last query"]["relevance"].mean == 0.0
    assert {p: p.stat().st_mtime_ns for p in options.run_dir.rglob("model.safetensors")} == before
    assert "last-token PPO" in capsys.readouterr().out


def test_two_demos_do_not_mix(options: demo.DemoSettings, tiny_model: Path) -> None:
    other = demo.DemoSettings(run_dir=options.run_dir, model=str(tiny_model), sft_steps=3, steps=1, sessions=60)
    with pytest.raises(UserError, match=r"sft_steps = '3'.*'2'.*--fresh"):
        demo.run_demo(other)


def test_methods_differ_in_credit_assignment_alone(options: demo.DemoSettings) -> None:
    a, b = (demo.run_config(options, Path("x"), name).model_dump() for name in demo.METHODS)
    assert (a["reward"].pop("placement"), b["reward"].pop("placement")) == ("token", "last")
    assert (a["ppo"].pop("gamma"), b["ppo"].pop("gamma")) == (0.7, 1.0)
    assert a.pop("run_dir") != b.pop("run_dir")
    assert (a["train"].pop("show_examples"), b["train"].pop("show_examples")) == (3, 0)
    assert a == b
