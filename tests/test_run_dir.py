"""What a run finds and leaves: folders of others, refused and unsaved runs, interrupted steps, models that are hard to save."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_trainer import config, finish, start, trajectory, values, write_toml

from tppo_fast import cli, run_dir, trainer
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.finetune_config import SFTConfig
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.metrics import read_metrics


def test_files_of_others_stay(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tensorboard", "metrics.jsonl"):
        run_dir = tmp_path / name
        run_dir.mkdir()
        (run_dir / "notes.txt").write_text("mine")
        (run_dir / name).mkdir() if name == "tensorboard" else (run_dir / name).write_text("mine")
        with pytest.raises(
            UserError, match=f"has a '{name}' that no unfinished run left: choose another, or remove it"
        ):
            trainer.train(config(tiny_model, run_dir))
        assert sorted(p.name for p in run_dir.iterdir()) == sorted([name, "notes.txt"])


@pytest.mark.parametrize("kind", [run_dir.POLICY, run_dir.REWARD_MODEL])
@pytest.mark.parametrize("name", ["checkpoints/step_1000", "best-12"])
def test_checkpoints_of_another_trainer_stay(tmp_path: Path, kind: run_dir.Kind, name: str) -> None:
    weights = tmp_path / name / "weights.bin"
    weights.parent.mkdir(parents=True)
    weights.write_text("theirs")
    mine = SFTConfig(run_dir=tmp_path)
    with pytest.raises(UserError, match=f"has a '{name}' that no unfinished run left: choose another, or remove it"):
        run_dir.check(mine, resume=False, kind=kind)
    assert weights.read_text() == "theirs"
    (tmp_path / run_dir.MARKER).touch()  # a run began here, and was killed while it wrote
    run_dir.check(mine, resume=False, kind=kind)


def test_a_refused_run_leaves_nothing_and_an_unsaved_one_is_replaced(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        trainer.train(config(tiny_model, tmp_path / "new", data__train="nowhere.jsonl"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="expected a finite number"):
        trainer.train(config(tiny_model, tmp_path / "old", reward={"source": "test_trainer:broken_reward"}))
    assert (tmp_path / "old" / "metrics.jsonl").exists()  # of the evaluation before the first step
    capsys.readouterr()
    trainer.train(config(tiny_model, tmp_path / "old", train__steps=1))
    assert "old': the run there saved nothing and is started over\n" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path / "old")] == [0, 1]
    assert (tmp_path / "old" / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code = cli.run(lambda: trainer.train(config(tiny_model, tmp_path / "r", train__save_every=1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "step_000001: Error while serializing: I/O error: File too large" in capsys.readouterr().err
    assert not list((tmp_path / "r" / "checkpoints").iterdir())


def random_reward(rollouts: Sequence[Rollout]) -> list[float]:
    return torch.rand(len(rollouts)).tolist()


def test_a_step_that_was_interrupted_after_scoring_is_taken_again_as_it_was(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"reward": {"source": "test_run_dir:random_reward"}, "train__steps": 3, "train__eval_every": 0}
    trainer.train(config(tiny_model, tmp_path / "whole", **wanted))
    prepare = trainer.PPO.prepare

    def interrupted(self: Any, batch: Any) -> Any:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return prepare(self, batch)

    monkeypatch.setattr(trainer.PPO, "prepare", interrupted)
    with pytest.raises(Interrupted):
        trainer.train(config(tiny_model, tmp_path / "r", **wanted))
    monkeypatch.setattr(trainer.PPO, "prepare", prepare)
    trainer.train(config(tiny_model, tmp_path / "r", **wanted), resume=True)
    assert trajectory(tmp_path / "r") == trajectory(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_scheduler_stops_a_run_as_ctrl_c_does_and_a_second_signal_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with InterruptGuard("after this step") as guard:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        guard.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            guard.check()
        assert capfd.readouterr().err == "\nstopping after this step; once more to stop at once, without saving\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_closed_terminal_stops_a_run_that_may_hear_of_it_twice() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with InterruptGuard("") as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Interrupted):
                guard.check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with InterruptGuard("") as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            guard.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_sweep_that_survives_errors_still_stops_at_ctrl_c() -> None:
    with InterruptGuard("") as guard:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted), contextlib.suppress(Exception):
            guard.check()


def test_a_model_whose_generation_settings_cannot_be_saved(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": False}))
    result = trainer.train(config(folder, tmp_path / "r", train__steps=1, train__eval_every=0))
    assert transformers.GenerationConfig.from_pretrained(result.policy).do_sample


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_is_set_up_ends_it_in_one_line(
    tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("these tests run in the background of a shell, where nobody's Ctrl-C arrives")
    (tmp_path / "slow.py").write_text("import pathlib, time\npathlib.Path('ready').touch()\ntime.sleep(100)")
    write_toml(tmp_path / "c.toml", values(tiny_model, tmp_path / "r", reward={"source": "slow:reward"}))
    process = start(tmp_path / "c.toml", cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    out, err = finish(process)
    assert (process.returncode, out) == (130, "")
    assert err.split("\n")[-2:] == ["interrupted: nothing new was saved", ""]
    assert "Traceback" not in err
