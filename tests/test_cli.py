"""The shell: exit codes, one sentence on stderr, help that needs no torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tppo_fast import __main__, cli
from tppo_fast.errors import JobsFailed, TrainingDiverged, UserError
from tppo_fast.interrupt import Interrupted
from tppo_fast.metrics import GLOSSARY


def tppo(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tppo_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def raising(error: BaseException) -> object:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("ppo.lr = -1: must be\npositive"), 2, "error: ppo.lr = -1: must be positive"),
        (TrainingDiverged({"step": 7}), 1, "step 7"),
        (JobsFailed("2 of 4 jobs failed"), 1, "2 of 4 jobs failed"),
        (Interrupted("stopped after step 3; continue with --resume"), 130, "--resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.exceptions.Abort(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied"),
        (MemoryError(), 1, "out of memory: take a smaller model"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "out of memory: take a smaller model"),
        (click.UsageError("no such option"), 2, "no such option"),
    ],
)
def test_exit_codes(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(raising(error)) == code  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "lower --ppo.microbatch_tokens, or set --model.gradient_checkpointing true"),
        ("sft", "lower --sft.microbatch_tokens, or set --model.gradient_checkpointing true"),
        ("dpo", "lower --dpo.microbatch_tokens, or set --model.gradient_checkpointing true"),
        ("reward-model", "lower --train.microbatch_tokens\n"),
    ],
)
def test_out_of_memory_names_the_commands_own_setting(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.cli.commands[command], "callback", raising(RuntimeError("CUDA out of memory")))
    monkeypatch.setattr(cli.cli.commands[command], "params", [])
    assert cli.run(lambda: cli.cli([command], standalone_mode=False)) == 1
    assert f"error: out of memory: {said}" in capsys.readouterr().err


def test_ctrl_c_while_the_shell_is_loading_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading:
        @property
        def cli(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "end_as_ctrl_c_does", lambda: None)  # of this process
    monkeypatch.setitem(sys.modules, "tppo_fast.cli", Loading())  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(raising(RuntimeError("a bug")))  # type: ignore[arg-type]


def test_help_is_instant_and_lists_every_setting() -> None:
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = tppo("train", "--help").stdout
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 3.0  # CPU time: others may be busy
    for name in ("--ppo.clip_high", "--rollout.temperature", "--seed", "--resume"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["trian"], "No such command 'trian'"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--lr", "nan"], "--lr nan: give a finite number"),
    ],
)
def test_usage_errors(arguments: list[str], said: str) -> None:
    done = tppo(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[ppo]\nlearning_rate = 1e-5\n")
    done = tppo("train", str(tmp_path / "c.toml"), "--ppo.clip_hihg", "0.3")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "ppo.learning_rate" in done.stderr


def test_metrics_stand_in_columns() -> None:
    lines = CliRunner().invoke(cli.cli, ["metrics"]).output.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(GLOSSARY)


@pytest.mark.parametrize("words", [["metrics"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_failure(words: list[str]) -> None:
    command = [sys.executable, "-m", "tppo_fast", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_version() -> None:
    assert "tppo-fast" in tppo("--version").stdout
