"""A trained policy answers: from Python and the shell, with the prompts that it learned from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tppo_fast import cli, generate
from tppo_fast.config import DataConfig
from tppo_fast.data import prompt_file
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.sessions import write_sessions
from tppo_fast.data.synthetic import generate_sessions
from tppo_fast.errors import UserError
from tppo_fast.loading import load_tokenizer
from tppo_fast.runs import warn_of_other_prompts
from tppo_fast.sft import sft

HISTORY = {"search": ["lisbon", "lisbon hotels"]}


def shell(*words: object) -> Result:
    return CliRunner().invoke(cli.cli, ["generate", *map(str, words)])


@pytest.fixture
def policy(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model, as a run would leave it that used other prompts than the defaults."""
    folder = tmp_path / "policy"
    shutil.copytree(tiny_model, folder)
    PromptBuilder(
        load_tokenizer(str(folder)), DataConfig(template="Asked: {history}\nNext:", separator=" | ")
    ).save_pretrained(folder)
    return folder


def test_python_and_the_shell_say_the_same(policy: Path) -> None:
    found = generate(policy, [HISTORY], samples=2, max_new_tokens=8)
    done = shell(policy, "--search", "lisbon", "--search", "lisbon hotels", "--samples", 2, "--max-new-tokens", 8)
    assert done.stdout.splitlines() == [" | ".join(queries) for queries in found[0]]
    assert len(found[0]) == 2
    assert done.stderr == ""


def test_prompts_are_those_that_the_policy_learned_from(policy: Path, tiny_model: Path) -> None:
    known = prompt_file.read(policy)
    assert known["template"] == "Asked: {history}\nNext:"
    given = generate(tiny_model, [HISTORY], greedy=True, max_new_tokens=8, prompts=known)
    assert given == generate(policy, [HISTORY], greedy=True, max_new_tokens=8)
    assert given != generate(tiny_model, [HISTORY], greedy=True, max_new_tokens=8)


def test_histories_of_any_number_and_seeds(policy: Path) -> None:
    many = [{"search": [f"query {i}"], "click": ["a.example"]} for i in range(10)]  # more than one batch
    found = generate(policy, many, max_new_tokens=4)
    assert len(found) == 10
    assert found == generate(policy, many, max_new_tokens=4)
    assert found != generate(policy, many, max_new_tokens=4, seed=1)
    assert generate(policy, []) == []


def test_a_file_of_histories_that_nobody_answered(policy: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "histories.jsonl", tmp_path / "responses.jsonl"
    rows = [{"user_id": f"u{i}", "history": {"search": [f"query {i}"]}} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (policy, "--data", data, "--out", out, "--max-new-tokens", 4)
    assert f"responses: 10 in {out}" in shell(*words).stdout
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["session"], row["user_id"]) for row in written] == [(i + 1, f"u{i}") for i in range(10)]
    before = out.read_bytes()
    assert shell(*words).exit_code == 0
    assert out.read_bytes() == before
    assert "was sampled with another temperature" in str(shell(*words, "--temperature", 0.5).exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Give --search (and --click), or --data and --out."),
        (("--search", "a", "--data", "x.jsonl", "--out", "y.jsonl"), "Give --search"),
        (("--search", "a", "--greedy", "--samples", "2"), "samples = 2 with greedy = True: they would all be the same"),
        (("--search", "a", "--greedy", "--temperature", "0.5"), "the most likely token has no temperature"),
        (("--search", "a", "--temperature", "nan"), "--temperature nan: give a finite number"),
        (("--search", " "), "history.search[0] = ' ' is blank"),
        (("--search", "a", "--engine", "tgi"), "tgi"),
    ],
)
def test_what_cannot_be_asked(policy: Path, words: tuple[str, ...], said: str) -> None:
    done = shell(policy, *words)
    assert done.exit_code != 0
    assert said in done.output + str(done.exception)


def test_what_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "POLICY = " in str(shell(tmp_path / "empty", "--search", "a").exception)
    with pytest.raises(UserError, match="no such folder"):
        generate(tmp_path / "none", [HISTORY])


def test_a_policy_of_elsewhere_gets_the_default_template_and_says_so(tiny_model: Path) -> None:
    assert "has no prompt.json: prompts are written by the default" in shell(tiny_model, "--search", "a").stderr


def test_a_run_leaves_its_prompts_and_the_next_one_tells_of_others(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sessions(tmp_path / "data.jsonl", generate_sessions(20, seed=0))
    data = {"train": str(tmp_path / "data.jsonl"), "template": "{history} =>", "num_queries": 2, "eval_fraction": 0.5}
    train = {"steps": 1, "tensorboard": False, "eval_prompts": 2}
    result = sft({"run_dir": str(tmp_path / "sft"), "model": {"path": str(tiny_model)}, "data": data, "train": train})
    known = prompt_file.read(result.policy)
    assert (known["template"], known["num_queries"]) == ("{history} =>", 2)
    capsys.readouterr()
    warn_of_other_prompts(result.policy, DataConfig(**known))
    assert capsys.readouterr().err == ""
    warn_of_other_prompts(result.policy, DataConfig(separator=" [b] "))
    said = " ".join(capsys.readouterr().err.split())
    assert "data.template = " in said
    assert "learned with '{history} =>': it will not do what it has learned" in said


@pytest.mark.parametrize("content", ["{", "[]", '{"templat": "x"}', '{"template": "no history"}', '{"separator": 3}'])
def test_a_damaged_file_of_prompts(policy: Path, content: str) -> None:
    (policy / prompt_file.FILE).write_text(content)
    with pytest.raises(UserError, match=r"prompt\.json' is damaged .*: mend it, or remove it"):
        generate(policy, [HISTORY])


def test_evaluate_and_label_write_prompts_as_the_policy_knows_them(
    policy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    write_sessions(data := tmp_path / "data.jsonl", generate_sessions(20, seed=0)[:2])
    words = ["evaluate", f"A={policy}", f"B={tiny_model}", "--data", str(data), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(cli.cli, words).exit_code == 0
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())["record"]["settings"]["data"]
    assert (settings["separator"], settings["template"]) == (" | ", "Asked: {history}\nNext:")
    out = tmp_path / "labels.jsonl"
    labels = ["label", str(data), "--responses", str(policy), "--labeller", "lexical", "--out", str(out)]
    assert CliRunner().invoke(cli.cli, labels).exit_code == 0
    assert json.loads((tmp_path / "labels.responses.jsonl.record.json").read_text())["separator"] == " | "
    (other := tmp_path / "defaults.toml").write_text("[data]\n")
    done = CliRunner().invoke(cli.cli, [*words, "--config", str(other), "--fresh"])
    assert (done.exit_code, done.stderr.count("it will not do what it has learned")) == (0, 1)
