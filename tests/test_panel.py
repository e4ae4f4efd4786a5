"""Policies against each other: rows that are always there, seeds stacked, duels in both orders, files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import prompt, rollout

from tppo_fast import cli, judging, panel
from tppo_fast.data.sessions import write_sessions
from tppo_fast.data.synthetic import generate_sessions
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.evaluate_command import parse_policies
from tppo_fast.rewards import LexicalLabeller


def answer(text: str) -> Rollout:
    p = prompt([1])  # history a, next query b
    return Rollout(prompt=p, token_ids=[1], logprobs=[0.0], text=text, finish_reason="stop", policy_version=0)


def test_duels_by_labels() -> None:
    judge = judging.by_labels(LexicalLabeller())
    a, b = [answer("b"), answer("c"), answer("b, c")], [answer("c"), answer("b"), answer("b, d")]
    assert judging.duels(judge, a, b).tolist() == [1.0, -1.0, 0.0]


def test_a_judge_that_prefers_a_place_sees_ties() -> None:
    assert judging.duels(lambda *_: "first", [answer("b")] * 2, [answer("c")] * 2).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="'maybe'"):
        judging.duels(lambda *_: "maybe", [answer("b")], [answer("c")])  # type: ignore[arg-type,return-value]
    other = rollout(prompt([1], user="v"), [1])
    with pytest.raises(UserError, match="different prompts"):
        judging.duels(lambda *_: "tie", [answer("b")], [other])


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
    assert (duel["win"], duel["tie"], duel["lose"]) == (0.0, 1.0, 0.0)
    assert duel["difference"]["mean"] == duel["difference"]["high"] == 0.0
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").read_text().splitlines()))
    assert {(r["policy"], r["metric"]) for r in rows} >= {("A", "judged"), (panel.COPY_LAST, "judged"), ("B", "hit_1")}


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        done = CliRunner().invoke(cli.cli, ["evaluate", "nowhere", "--data", "absent.jsonl", "--out", str(out)])
        assert isinstance(done.exception, UserError)
        assert "is no folder to write into" in str(done.exception)


def test_a_missing_policy_is_named() -> None:
    with pytest.raises(UserError, match="'A=nowhere'"):
        parse_policies(["A=nowhere"])
