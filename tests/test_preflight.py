"""What is wrong with a run is said before torch is loaded: in one sentence, with 2, and without a trace in the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tppo_fast import checkpoint, losses, preflight
from tppo_fast import config as settings
from tppo_fast.errors import UserError
from tppo_fast.plugins import guarded, load_object

SHELL = """
import json, sys
from tppo_fast import cli
for words in json.loads(sys.argv[1]):
    print(cli.run(lambda: cli.cli(words, standalone_mode=False)), "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_the_names_that_need_no_module_are_those_that_there_are() -> None:
    assert preflight.BUILT_IN["ppo.loss"] == (*losses.BUILT_IN,)


def test_the_shell_refuses_without_torch(tmp_path: Path) -> None:
    rows, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    rows.write_text("{}\n")
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    (runs / "log").mkdir(parents=True)
    (runs / "log" / "metrics.jsonl").touch()
    given = {"run_dir": str(runs / "saved"), "model": {"path": "hub/name"}, "data": {"train": str(rows)}}
    saved = settings.build(given | {"ppo": {"lr": 1.0}})
    checkpoint.write(saved.run_dir, 1, lambda _: {}, torch.optim.SGD([torch.zeros(1)]), saved, keep=1)
    (tmp_path / "c.toml").write_text(
        f"run_dir = {str(runs / 'new')!r}\nmodel.path = 'hub/name'\ndata.train = {str(rows)!r}"
    )

    def words(command: str, *over: str) -> list[str]:
        return [command, str(tmp_path / "c.toml"), *over]

    wrong: list[tuple[list[str], str]] = [
        (words("train", "--data.train", str(tmp_path / "no.jsonl")), "no.jsonl' cannot be read (No such file"),
        (words("train", "--data.train", str(tmp_path / "rows.csv")), "ends in '.csv': give a .jsonl or .parquet file"),
        (words("sft", "--data.eval", str(tmp_path / "none.jsonl")), "is empty: give a file with at least one session"),
        (words("dpo", "--data.train", str(tmp_path)), "cannot be read (Is a directory)"),
        (words("sft", "--model.path", ""), "model.path = '': give the folder"),
        (
            words("sft", "--model.path", str(tmp_path / "model")),
            "its weights are pickles, which are not loaded; if you",
        ),
        (words("train", "--reward.source", "nowhere:f"), "there is no module 'nowhere'"),
        (words("train", "--reward.source", "lexicla"), "write a built-in name or module:function"),
        (words("train", "--ppo.loss", "grpo"), "ppo.loss = 'grpo': write a built-in name or module:function"),
        (words("sft", "--rollout.engine", "vllm2"), "rollout.engine = 'vllm2': write a built-in name"),
        (words("train", "--reward.source", "os:getcwd"), "takes () and is called with (rollouts)"),
        (words("train", "--reward.source", "fractions:Fraction"), "is a class: name a function, or an instance"),
        (words("train", "--ppo.loss", "os:getcwd"), "(evaluation, batch, config, kl_coef, train_policy)"),
        (words("sft", "--rollout.engine", "os:getcwd"), "takes () and is called with (config, tokenizer, device)"),
        (words("train", "--resume"), "there is no checkpoint to resume"),
        (words("train", "--resume", "--run_dir", str(runs / "saved")), "ppo.lr = 1e-05, but the run in"),
        (words("dpo", "--run_dir", str(runs / "saved")), "holds a run already"),
        (words("train", "--run_dir", str(runs / "log")), "has a 'metrics.jsonl' that no unfinished run left"),
    ]
    (tmp_path / "rm.toml").write_text(f"run_dir = {str(runs / 'new')!r}")
    wrong.append((["reward-model", str(tmp_path / "rm.toml")], "data.labels = '': give the file"))
    asked = json.dumps([command for command, _ in wrong])
    done = subprocess.run([sys.executable, "-c", SHELL, asked], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["2 False False"] * len(wrong)
    for line, (_, said) in zip(done.stderr.splitlines(), wrong, strict=True):
        assert said in line
    assert not (runs / "new").exists()


def test_built_ins_that_do_not_tell_their_signature_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def untold(_: Any) -> None:
        raise ValueError("no signature found")

    with pytest.raises(UserError, match=r"is called with \(rollouts\)"):
        load_object("os:getcwd", "reward.source")
    monkeypatch.setattr("tppo_fast.plugins.inspect.signature", untold)
    assert callable(load_object("os:getcwd", "reward.source"))


def failing(rollouts: Sequence[int]) -> list[int]:
    return sorted(rollouts, key=lambda _: json.loads("{"))


def test_the_place_of_a_failure_is_the_last_one_in_the_users_own_code() -> None:
    line = failing.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"failed with JSONDecodeError \(.*\) at .*test_preflight\.py:{line}$"):
        guarded(failing, "reward.source = 'test_preflight:failing'")([1])
    with pytest.raises(UserError, match=r"failed with TypeError \(bad operand type for abs\(\): 'str'\)$"):
        guarded(abs, "reward.source = 'builtins:abs'")("1")  # type: ignore[arg-type]


def test_a_whole_config_passes(tiny_model: Path) -> None:
    config = settings.build({"model": {"path": str(tiny_model)}, "reward": {"source": "test_preflight:failing"}})
    preflight.check_inputs(config)
