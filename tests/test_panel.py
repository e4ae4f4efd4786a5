"""Policies against each other: rows that are always there, seeds stacked, duels in both orders, files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support import prompt, rollout, tiny_llama, write_model

from tppo_fast import cli, evaluate_command, judging, panel
from tppo_fast.config import RunConfig
from tppo_fast.data.sessions import write_sessions
from tppo_fast.data.synthetic import generate_sessions
from tppo_fast.data_types import Rollout
from tppo_fast.errors import LabellingFailed, UserError
from tppo_fast.estimates import Difference
from tppo_fast.evaluate_command import parse_policies
from tppo_fast.rewards import Labels, LexicalLabeller


def answer(text: str) -> Rollout:
    p = prompt([1])  # history a, next query b
    return Rollout(prompt=p, token_ids=[1], logprobs=[0.0], text=text, finish_reason="stop", policy_version=0)


def test_duels_by_labels() -> None:
    judge = judging.by_labels(LexicalLabeller())
    a, b = [answer("b"), answer("c"), answer("b, c")], [answer("c"), answer("b"), answer("b, d")]
    assert judging.duels(judge, a, b).tolist() == [1.0, -1.0, 0.0]


def test_a_response_is_judged_once_in_all_duels() -> None:
    asked: list[tuple[str, ...]] = []

    def labeller(history: Sequence[str], next_queries: Sequence[str], text: str, /) -> Labels:
        asked.append((*history, *next_queries, text))
        return LexicalLabeller()(history, next_queries, text)

    judges = panel.Judges(labeller=labeller)
    answers = {name: [[answer(text), answer("b")]] for name, text in (("A", "c"), ("B", "d"), ("C", "e"))}
    scores = {name: {"judged": np.array([[panel._judged(judges.labeller, r, r.text) for r in rows[0]]])}
              for name, rows in answers.items()}  # fmt: skip
    found = panel.Panel(users=["u", "v"], scores=scores, rollouts=answers)
    assert len(found.duels(judges)) == 3
    assert sorted(asked) == [("a", "b", text) for text in "bcde"]


def test_a_judge_that_prefers_a_place_sees_ties() -> None:
    assert judging.duels(lambda *_: "first", [answer("b")] * 2, [answer("c")] * 2).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="'maybe'"):
        judging.duels(lambda *_: "maybe", [answer("b")], [answer("c")])  # type: ignore[arg-type,return-value]
    other = rollout(prompt([1], user="v"), [1])
    with pytest.raises(UserError, match="different prompts"):
        judging.duels(lambda *_: "tie", [answer("b")], [other])


def test_p_values_are_corrected_within_a_metric() -> None:
    family = {
        name: {"x": Difference(mean=0.1, p=p), "y": Difference(mean=0.1, p=p / 10)}
        for name, p in (("A", 0.03), ("B", 0.04))
    }
    got = panel.corrected(family)
    assert {name: [row["x"].p, row["y"].p] for name, row in got.items()} == {
        "A": pytest.approx([0.06, 0.006]),
        "B": pytest.approx([0.06, 0.006]),
    }
    assert panel.corrected({}) == {}


def test_similarity_by_hand() -> None:
    vectors = {"x": np.array([1.0, 0.0]), "y": np.array([0.0, 1.0]), "z": np.array([0.6, 0.8])}
    got = panel.similarity(lambda _: vectors, [(["x", "z"], ["x", "y"]), ([" "], ["x"]), (["y"], ["x"])])
    assert got.tolist() == pytest.approx([0.9, 0.0, 0.0])


def test_the_command_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    write_sessions(tmp_path / "s.jsonl", generate_sessions(30, 0)[:8])
    (tmp_path / "c.toml").write_text("threads = 1\n[rollout]\nmax_new_tokens = 6\n[data]\nmax_prompt_tokens = 180\n")
    words = [f"A={tiny_model}", f"A={other}", f"B={tiny_model}", f"B={other}", str(other)]
    done = CliRunner().invoke(
        cli.cli,
        ["evaluate", *words, "--data", str(tmp_path / "s.jsonl"), "--config", str(tmp_path / "c.toml"), "--out",
         str(tmp_path / "out"), "--responses", "2"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    assert {"copy", "the", "last", "query"} <= set(done.output.replace("│", " ").split())
    whole = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(whole["table"]) == [panel.COPY_LAST, "A", "B", str(other)]
    assert set(whole["table"]["A"]) <= set(whole["metrics"])
    assert whole["table"][panel.COPY_LAST]["relevance"]["mean"] == 0.0
    (duel,) = whole["duels"]  # the third policy has one run and cannot be paired with two
    assert "are not compared: 2 and 1 runs" in " ".join(done.output.split())
    assert (duel["win"], duel["tie"], duel["lose"]) == (0.0, 1.0, 0.0)
    assert set(duel["differences"]) >= {"relevance", "judged", "hit", "length"}
    for gap in duel["differences"].values():
        assert gap["mean"] == gap["low"] == gap["high"] == 0.0
    assert "users are few" in done.output
    for what in ("held-out relevance", "share judged relevant"):
        assert f"No difference could be shown between A and B on {what}" in " ".join(done.output.split())
    gaps = list(csv.DictReader((tmp_path / "out" / "differences.csv").read_text().splitlines()))
    assert {(r["a"], r["b"]) for r in gaps} == {("A", "B")}
    assert {r["metric"]: float(r["p"]) for r in gaps} == dict.fromkeys(duel["differences"], 1.0)
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").read_text().splitlines()))
    assert {(r["policy"], r["metric"]) for r in rows} >= {("A", "judged"), (panel.COPY_LAST, "judged"), ("B", "hit_1")}
    with (tmp_path / "out" / "responses.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 5 * 8 * 2
    assert [int(r["session"]) for r in kept[:16]] == [1 + i // 2 for i in range(16)]
    mean = sum(float(r["length"]) for r in kept if r["policy"] == "A") / 32
    assert mean == pytest.approx(whole["table"]["A"]["length"]["mean"], abs=1e-6)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        done = CliRunner().invoke(cli.cli, ["evaluate", "nowhere", "--data", "absent.jsonl", "--out", str(out)])
        assert isinstance(done.exception, UserError)
        assert "is no folder to write into" in str(done.exception)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("A=nowhere", "there is no folder 'nowhere'"),
        ("=.", "'' is no name"),
        (f"{panel.COPY_LAST}=.", "is the row that is always there"),
        (panel.COPY_LAST, "is the row that is always there"),
    ],
)
def test_a_policy_that_cannot_stand_in_the_table_is_named(word: str, said: str) -> None:
    with pytest.raises(UserError, match=f"policy '{word}': .*{said}"):
        parse_policies([word])


def test_a_folders_name_may_hold_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert parse_policies([f"{folder}/", f"A={folder}"]) == {str(folder): [folder], "A": [folder]}


def evaluate(folder: Path, *words: str) -> Result:
    write_sessions(folder / "s.jsonl", generate_sessions(30, 0)[:2])
    if not (folder / "c.toml").exists():
        (folder / "c.toml").write_text("threads = 1\n[rollout]\nmax_new_tokens = 4\n[data]\nmax_prompt_tokens = 180\n")
    own = ["--data", str(folder / "s.jsonl"), "--config", str(folder / "c.toml"), "--out", str(folder / "out")]
    return CliRunner().invoke(cli.cli, ["evaluate", *words, *own])


def test_names_are_text_and_stand_in_the_files_first(tiny_model: Path, tmp_path: Path) -> None:
    done = evaluate(tmp_path, f"[/x]={tiny_model}", f"B [lr 1e-3]={tiny_model}")
    assert done.exception is None
    assert "No difference could be shown between [/x] and B [lr 1e-3]" in done.output
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())["table"])[1:] == ["[/x]", "B [lr 1e-3]"]


def test_another_evaluation_is_not_replaced_unasked(tiny_model: Path, tmp_path: Path) -> None:
    first = evaluate(tmp_path, f"A={tiny_model}")
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    assert evaluate(tmp_path, f"A={tiny_model}").exception is first.exception is None
    refused = evaluate(tmp_path, f"B={tiny_model}")
    assert "holds an evaluation with other policies: choose another folder, or use --fresh" in str(refused.exception)
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    assert evaluate(tmp_path, f"B={tiny_model}", "--fresh").exception is None


def test_files_that_cannot_be_written_cost_no_table(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "evaluation.json").mkdir(parents=True)
    done = evaluate(tmp_path, f"A={tiny_model}")
    assert "cannot be written" in str(done.exception)
    assert "Held-out sessions: mean" in done.output


def test_the_table_is_made_once_with_the_runs_seed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    summarise = panel.evaluate.summarise

    def seen(scores: panel.Scores, users: list[str], *, seed: int) -> dict[str, panel.Estimate]:
        seeds.append(seed)
        return summarise(scores, users, seed=seed)

    monkeypatch.setattr(panel.evaluate, "summarise", seen)
    assert evaluate(tmp_path, f"A={tiny_model}", "--seed", "7").exception is None
    assert seeds == [7, 7]  # A and the copies


def broken(folder: Path, how: str) -> str:
    """Why a copy of a good folder cannot be evaluated, once it is made so."""
    if how == "vocabulary":
        write_model(folder, lambda size: tiny_llama(size - 7))
        return "embedding table 293 rows"
    if how == "positions":
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 8}))
        return "the model has 8"
    (folder / how).unlink()
    return {
        "config.json": "no causal language model could be loaded",
        "tokenizer.json": "no tokenizer could be loaded",
        "model.safetensors": "there are no weights: *.safetensors",
    }[how]


@pytest.mark.parametrize("how", ["config.json", "tokenizer.json", "model.safetensors", "vocabulary", "positions"])
def test_every_folder_is_looked_at_before_one_is_sampled(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "B")
    said = broken(tmp_path / "B", how)
    monkeypatch.setattr(panel, "respond", None)
    done = evaluate(tmp_path, f"A={tiny_model}", f"B={tmp_path / 'B'}")
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)
    assert str(tmp_path / "B") in str(done.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--judge", "json:dumps"], "--judge = 'json:dumps' takes (obj"),
        (["--judge", "test_panel:failing"], "--judge = 'test_panel:failing' failed with ZeroDivisionError"),
        (["--judge", "test_panel:mute"], "--judge = 'test_panel:mute' returned a NoneType"),
        (["--embedding", "nosuch"], "--embedding 'nosuch': give a folder"),
    ],
)
def test_judges_that_do_not_keep_their_side(tiny_model: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = evaluate(tmp_path, f"A={tiny_model}", f"B={tiny_model}", *options)
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("test_panel:failing", "--pair-judge = 'test_panel:failing' failed with ZeroDivisionError"),
        ("test_panel:several", "the pair judge answered"),
    ],
)
def test_a_pair_judge_that_fails_costs_only_the_duels(tiny_model: Path, tmp_path: Path, judge: str, said: str) -> None:
    done = evaluate(tmp_path, f"A={tiny_model}", f"B={tiny_model}", "--pair-judge", judge)
    assert isinstance(done.exception, LabellingFailed)
    assert said in str(done.exception)
    assert "copy the last query" in " ".join(done.output.replace("│", " ").split())
    whole = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (list(whole["table"]), whole["duels"]) == ([panel.COPY_LAST, "A", "B"], [])


def mute(*_: object) -> None: ...


def failing(*_: object) -> None:
    raise ZeroDivisionError


def several(*_: object) -> list[str]:
    return ["first", "second"]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_file_of_another_kind_of_run_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (tmp_path / "c.toml").write_text(f"[{kind}]\nlr = 1e-4\n[data]\nnum_queries = 2\n")
    given: list[RunConfig] = []
    monkeypatch.setattr(evaluate_command, "run", lambda config, *_, **__: given.append(config))
    done = evaluate(tmp_path, "A=.")
    assert done.exception is None
    assert given[0].data.num_queries == 2
    (tmp_path / "c.toml").write_text(f"[{kind}]\nlearning_rate = 1e-4\n")
    assert f"unknown setting '{kind}.learning_rate'" in str(evaluate(tmp_path, "A=.").exception)
