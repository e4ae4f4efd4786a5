"""The demo end to end, small: it finishes, reports, continues, and refuses to mix two demos."""

from __future__ import annotations

from dataclasses import replace
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


def written(options: demo.DemoSettings) -> set[str]:
    return {path.name for path in demo._written(options.run_dir)} - {"untrained"}  # a model was given


def test_leaves_report_curves_and_policies(options: demo.DemoSettings) -> None:
    assert {p.name for p in options.run_dir.iterdir()} == {"demo.json", *written(options)}
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


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("fresh", "name", "said"),
    [
        (
            True,
            "thesis.txt",
            r"^--run-dir '.*mine' has a 'thesis\.txt' but no demo, and --fresh removes an earlier demo",
        ),
        (
            False,
            "train.jsonl",
            r"^--run-dir '.*mine' has a 'train\.jsonl' that no demo wrote: choose another folder, or",
        ),
        (False, "eval.jsonl", r"has a 'eval\.jsonl' that no demo wrote"),
        (False, "start/weights.bin", r"has a 'start' that no demo wrote"),
        (False, "tppo/policy/weights.bin", r"has a 'tppo' that no demo wrote"),
        (False, "report-kl.png", r"has a 'report-kl\.png' that no demo wrote"),
    ],
)
def test_a_folder_that_is_no_demos_keeps_its_files(tmp_path: Path, fresh: bool, name: str, said: str) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=said):
        demo.open_folder(demo.DemoSettings(run_dir=tmp_path / "mine", fresh=fresh))
    assert files(tmp_path / "mine") == {name: "mine"}


def test_fresh_removes_what_a_demo_wrote_and_nothing_else(tmp_path: Path) -> None:
    demo.open_folder(demo.DemoSettings(run_dir=tmp_path / "new" / "d", fresh=True))  # there is nothing to remove
    notes = tmp_path / "d" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    demo.open_folder(demo.DemoSettings(run_dir=tmp_path / "d"))
    for path in demo._written(tmp_path / "d"):
        if path.suffix:
            path.write_text("the demo's")
        else:
            path.mkdir()
            (path / "weights.bin").write_text("the demo's")
    demo.open_folder(demo.DemoSettings(run_dir=tmp_path / "d", steps=3, fresh=True))
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["demo.json", "notes.txt"]
    assert '"steps": "3"' in (tmp_path / "d" / "demo.json").read_text()


@pytest.mark.parametrize(("name", "path"), [("data", "train.jsonl"), ("model", "start"), ("model", "tppo/policy")])
def test_a_demo_does_not_replace_what_it_is_given(tmp_path: Path, name: str, path: str) -> None:
    before = demo.DemoSettings(run_dir=tmp_path, fresh=True)
    demo.open_folder(before)
    (tmp_path / path).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^--{name} = '.*{path}' lies where the demo in '.*' writes: choose another"):
        demo.open_folder(replace(before, **{name: str(tmp_path / path)}))  # type: ignore[arg-type]
    assert (tmp_path / path).exists()


def test_a_damaged_record_is_one_sentence_and_fresh_starts_over(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text('{"se')
    with pytest.raises(
        UserError, match=r"^'.*demo\.json' is damaged \(Unterminated .*\): start again in another folder$"
    ):
        demo.open_folder(demo.DemoSettings(run_dir=tmp_path))
    demo.open_folder(demo.DemoSettings(run_dir=tmp_path, fresh=True))
