"""The log survives kills and resumes without counting a step twice; progress is readable in a log file."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import tppo_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tppo_fast import evaluate
from tppo_fast import progress as progress_module
from tppo_fast.atomic import write_atomic
from tppo_fast.errors import UserError
from tppo_fast.metrics import GLOSSARY, METRICS_FILE, MetricsLogger, read_metrics
from tppo_fast.progress import Progress
from tppo_fast.progress import _duration as duration


def logger(run_dir: Path, **options: Any) -> MetricsLogger:
    return MetricsLogger(run_dir, **{"tensorboard": False, "config": {"seed": 0}, **options})


def write_steps(run_dir: Path, last: int, *, factor: float = 1.0, **options: Any) -> None:
    with logger(run_dir, **options) as log:
        for step in range(options.get("start_step", 0) + 1, last + 1):
            log.log(step, {"ppo/kl": factor * step})


# ---------------------------------------------------------------- the glossary


def test_every_definition_is_one_sentence_in_a_known_group():
    groups = {name.partition("/")[0] for name in GLOSSARY}
    assert groups == {"rollout", "ppo", "parity", "eval", "time", "perf", "fit", "dpo", "reward_model"}
    for name, meaning in GLOSSARY.items():
        assert re.fullmatch(r"[a-z_]+/[a-z_0-9.]+", name)
        assert meaning.endswith("."), name
        assert ". " not in meaning, name


def test_a_metric_without_definition_is_refused_and_nothing_is_written(tmp_path: Path):
    with logger(tmp_path) as log, pytest.raises(ValueError, match="'ppo/kll' has no definition"):
        log.log(1, {"ppo/kl": 0.1, "ppo/kll": 0.2})
    assert read_metrics(tmp_path) == []


def test_everything_that_is_evaluated_and_every_loss_term_is_defined():
    names = {f"eval/{name}" for name in evaluate.METRICS}
    sums = tppo_kernels.ppo_loss(*torch.zeros(3, 2))[1]
    names |= {f"ppo/{name}" for name in sums if name != "ratio_sq"}  # which the effective sample size consumes
    assert names <= set(GLOSSARY)


def test_a_custom_loss_may_log_what_it_likes_under_its_own_prefix(tmp_path: Path):
    with logger(tmp_path) as log:
        log.log(1, {"custom/margin": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "custom/margin": 0.5}]


# ---------------------------------------------------------------- the file


@given(values=st.lists(st.floats(), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_values_come_back_bit_for_bit_and_non_finite_ones_as_none(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
):
    folder = tmp_path_factory.mktemp("run")
    with logger(folder) as log:
        for step, value in enumerate(values):
            log.log(step, {"ppo/kl": value})
    assert read_metrics(folder) == [
        {"step": step, "ppo/kl": value if math.isfinite(value) else None} for step, value in enumerate(values)
    ]
    for line in (folder / METRICS_FILE).read_text().splitlines():  # strict JSON: no NaN, no Infinity
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_each_row_is_on_disk_before_the_next_step(tmp_path: Path):
    log = logger(tmp_path)
    log.log(1, {"ppo/kl": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "ppo/kl": 0.5}]
    log.close()
    log.close()


def test_tensor_values_are_logged_as_numbers(tmp_path: Path):
    with logger(tmp_path) as log:
        log.log(1, {"ppo/kl": torch.tensor(0.5), "ppo/microbatches": 3})  # type: ignore[dict-item]
    assert read_metrics(tmp_path) == [{"step": 1, "ppo/kl": 0.5, "ppo/microbatches": 3.0}]


def test_resume_removes_later_steps_and_keeps_earlier_ones(tmp_path: Path):
    write_steps(tmp_path, 5)
    write_steps(tmp_path, 6, start_step=3, factor=10.0)
    assert [(row["step"], row["ppo/kl"]) for row in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0),
    ]  # fmt: skip


def test_resume_before_the_first_step_keeps_the_first_evaluation(tmp_path: Path):
    with logger(tmp_path) as log:
        log.log(0, {"eval/relevance": 0.25})
        log.log(1, {"ppo/kl": 1.0})
    write_steps(tmp_path, 1, start_step=0, factor=2.0)
    assert read_metrics(tmp_path) == [{"step": 0, "eval/relevance": 0.25}, {"step": 1, "ppo/kl": 2.0}]


@given(cut=st.integers(min_value=1, max_value=30))
@settings(deadline=None, max_examples=30)
def test_a_line_cut_by_a_kill_is_dropped_and_never_joined_to_the_next(
    tmp_path_factory: pytest.TempPathFactory, cut: int
):
    folder = tmp_path_factory.mktemp("run")
    write_steps(folder, 3)
    path = folder / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [1, 2, 3] if cut == 1 else [1, 2] if cut <= len('{"step": 3, "ppo/kl": 3.0}\n') + 1 else [1]
    assert [row["step"] for row in read_metrics(folder)] == kept
    write_steps(folder, 4, start_step=3)
    assert [row["step"] for row in read_metrics(folder)] == [*kept, 4]
    assert path.read_bytes().count(b"\n") == len(kept) + 1


def test_rows_of_one_step_are_merged(tmp_path: Path):
    with logger(tmp_path) as log:
        log.log(1, {"ppo/kl": 1.0})
        log.log(1, {"eval/relevance": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "ppo/kl": 1.0, "eval/relevance": 0.5}]


@pytest.mark.parametrize("bad", ["not json", '{"no": "step"}', "[1]", '{"step": true}', "\x00\x00"])
def test_damage_in_the_middle_is_named(tmp_path: Path, bad: str):
    (tmp_path / METRICS_FILE).write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_a_folder_without_a_log_or_a_file_in_its_place_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir"):
        logger(tmp_path / "file")


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


# ---------------------------------------------------------------- TensorBoard and W&B


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path):
    write_steps(tmp_path, 4, tensorboard=True)
    write_steps(tmp_path, 5, start_step=2, factor=10.0, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("ppo/kl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
        (5, 50.0),
    ]


def fake_wandb(monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> list[Any]:
    """Stands in for the package, with the calls it received."""
    calls: list[Any] = []
    module: Any = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})

    def init(**options: Any) -> Any:
        if fails:
            raise module.Error("no API key\nconfigured")
        calls.append(options["id"])
        return types.SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_a_resumed_run_continues_its_own_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = fake_wandb(monkeypatch)
    with logger(tmp_path, wandb_project="p") as log:
        log.log(1, {"ppo/kl": 0.5, "ppo/entropy": math.nan})
    with logger(tmp_path, wandb_project="p", start_step=1):
        pass
    assert calls[1:3] == [(1, {"ppo/kl": 0.5}), "finished"]
    assert calls[0] == calls[3]
    (tmp_path / METRICS_FILE).unlink()  # what the trainer does for a new run
    with logger(tmp_path, wandb_project="p"):
        pass
    assert calls[5] != calls[0]


def test_wandb_missing_or_refusing_is_one_sentence_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.wandb_project = 'p'.*pip install wandb"):
        logger(tmp_path, wandb_project="p")
    fake_wandb(monkeypatch, fails=True)
    with pytest.raises(UserError, match=r"no API key configured.*wandb login"):
        logger(tmp_path, wandb_project="p")


# ---------------------------------------------------------------- progress


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_module, "time", made)
    return made


def run_steps(clock: Clock, count: int, seconds: float, *, start: int = 0, total: int = 100) -> None:
    with Progress("train", total, "it", start=start) as progress:
        for step in range(count):
            clock.now += seconds
            progress.update(reward=0.01 * (step + 1), kl=1e-5)


def test_plain_lines_first_last_and_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]):
    run_steps(clock, 25, 1.0, total=100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "train 0/100 it",
        "train 10/100 1 it/s ETA 1m30s reward=0.1 kl=1e-05",
        "train 20/100 1 it/s ETA 1m20s reward=0.2 kl=1e-05",
        "train 25/100 1 it/s in 25s reward=0.25 kl=1e-05",
    ]
    assert all(character.isprintable() or character == "\n" for character in captured.err)


def test_rate_and_time_left_count_from_the_resumed_step(clock: Clock, capsys: pytest.CaptureFixture[str]):
    run_steps(clock, 2, 20.0, start=90)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train 90/100 it"
    assert lines[1].startswith("train 91/100 20 s/it ETA 3m00s")


def test_work_of_no_items_and_work_that_fails_still_end_with_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]):
    run_steps(clock, 0, 0.0, total=0)
    assert capsys.readouterr().err.splitlines() == ["train 0/0 it", "train 0/0 in 0s"]
    progress = Progress("eval", 4, "prompt")
    with contextlib.suppress(ZeroDivisionError), progress:
        clock.now += 2.0
        progress.update(3)
        _ = 1 / 0
    assert capsys.readouterr().err.splitlines()[-1] == "eval 3/4 1.5 prompt/s in 2s"


def test_plain_lines_name_a_phase_when_it_is_new_and_when_it_is_long(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Progress("train", 3, "step") as progress:
        for seconds in (1.0, 1.0, 6.0):
            progress.phase("rollout")
            clock.now += seconds
            for part in ("1/3", "2/3", "3/3"):
                progress.phase("update", part)
                clock.now += seconds
            progress.update(reward=0.31)
    assert capsys.readouterr().err.splitlines() == [
        "train 0/3 step",
        "train 0/3 rollout",
        "train 0/3 update 1/3",
        "train 2/3 update 1/3 0.143 step/s ETA 7s reward=0.31",
        "train 2/3 update 3/3 13 s/step ETA 13s reward=0.31",
        "train 3/3 10.7 s/step in 32s reward=0.31",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.6, "1m00s"), (106, "1m46s"), (3599.7, "1h00m"), (7380, "2h03m")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_nested_work_shares_one_terminal_display(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("train", 2, "step") as outer:
        outer.update(reward=0.31)
        outer.phase("update", "2/8")
        assert outer._status().startswith("update 2/8 ")
        with Progress("eval", 8, "prompt") as inner:
            inner.update(8)
        outer.update(reward=0.42)
    text = terminal.getvalue()
    assert "eval" in text
    assert "2/2 step" in text
    assert "reward=0.42" in text
    assert progress_module._bars is None


def test_the_first_of_two_runs_may_end_first(monkeypatch: pytest.MonkeyPatch):
    """As two runs in threads do."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.ExitStack() as second:
        with Progress("one", 2, "step"):
            other = second.enter_context(Progress("two", 8, "step"))
        other.update(8)
    assert "8/8 step" in terminal.getvalue()
    assert progress_module._bars is None
