"""Resuming: what may change in between, what must not, damaged and dropped checkpoints, one run in a folder at a time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_trainer import config, trajectory, values, write_toml

from tppo_fast import checkpoint, run_dir, sft, trainer
from tppo_fast.config import Config
from tppo_fast.data_types import Rollout
from tppo_fast.errors import EngineError, UserError
from tppo_fast.finetune_config import DPOConfig, SFTConfig
from tppo_fast.metrics import read_metrics
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rollout.hf_engine import HFEngine
from tppo_fast.run_dir import MARKER, open_run_dir
from tppo_fast.sections import build_section

SHORT: dict[str, Any] = {"train__steps": 2, "train__eval_every": 0, "ppo__lr_schedule": "constant"}


@pytest.fixture(scope="module")
def short_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    trainer.train(config(tiny_model, run_dir, **SHORT))
    return run_dir


def empty_checkpoint(given: Any, step: int, keep: int = 1) -> Path:
    """A checkpoint of a run without a model."""
    return checkpoint.write(given.run_dir, step, lambda _: {}, torch.optim.SGD([torch.zeros(1)]), given, keep=keep)


def test_an_input_that_cannot_be_read_is_named_and_leaves_nothing(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_dir, "sha256_of", refuse)
    with (
        pytest.raises(UserError, match=r"model\.path = .* cannot be read \(Permission denied\)"),
        open_run_dir(config(tiny_model, tmp_path / "run"), resume=False),
    ):
        pass
    assert not (tmp_path / "run").exists()


SERVER = {"rollout__engine": "vllm", "vllm__process": "server", "vllm__url": "http://a:1"}


@pytest.mark.parametrize(
    "change",
    [
        {"vllm__url": "http://b:1"},
        {"vllm__transfer": "nccl", "vllm__trainer_address": "10.0.0.1"},
        {"vllm__timeout": 1200.0, "vllm__retries": 5, "vllm__bucket_mib": 64},
        {"rollout__parity_mean_limit": 0.1, "rollout__parity_max_limit": 1.0, "rollout__parity_gate": False},
    ],
)
def test_settings_that_change_no_result_are_free(tmp_path: Path, change: dict[str, Any]) -> None:
    def given(**changes: Any) -> Config:
        return config(tmp_path / "model", tmp_path, **{**SERVER, **changes})

    saved = empty_checkpoint(given(), 1)
    assert run_dir.check_resumable(tmp_path, given(**change), run_dir.FREE) == saved
    with pytest.raises(UserError, match=r"vllm\.kv_cache_gib = 2\.0, but the run in .* has None"):
        run_dir.check_resumable(tmp_path, given(vllm__kv_cache_gib=2.0), run_dir.FREE)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft's own class
def test_a_model_that_changed_in_between_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder, run_dir = tmp_path / "model", tmp_path / "r"
    shutil.copytree(tiny_model, folder)
    adapters = {**SHORT, "model__lora_rank": 2}
    trainer.train(config(folder, run_dir, **{**adapters, "train__steps": 1}))
    (folder / "README.md").write_text("a note about the model")
    trainer.train(config(folder, run_dir, **adapters), resume=True)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        lm.model.norm.weight.mul_(1.5)
    lm.save_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.path = '.*model' has changed since the run in '.*r' began") as caught:
        trainer.train(config(folder, run_dir, **adapters), resume=True)
    assert "\n" not in str(caught.value)
    (run_dir / MARKER).write_text("")  # a run of a version that noted nothing
    trainer.train(config(folder, run_dir, **adapters), resume=True)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [(SFTConfig, "data.train"), (DPOConfig, "data.eval"), (RewardModelConfig, "data.labels")],
)
def test_data_that_changed_in_between_are_refused(kind: type, setting: str, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "r"
    data.write_text("before")
    section, name = setting.split(".")
    given = build_section({"run_dir": str(run_dir), section: {name: str(data)}}, kind)
    with open_run_dir(given, resume=False):
        empty_checkpoint(given, 1)
    with open_run_dir(given, resume=True) as start_from:
        assert start_from is not None
    data.write_text("after")
    with pytest.raises(UserError, match=rf"{setting} = '.*data\.jsonl' has changed"), open_run_dir(given, resume=True):
        pass


def test_a_damaged_policy_is_the_checkpoints_not_the_models(tiny_model: Path, short_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    shutil.copytree(short_run, run_dir)
    weights = checkpoint.list_checkpoints(run_dir)[-1] / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"^checkpoint .*step_000002' cannot be loaded .*remove it to resume") as caught:
        trainer.train(config(tiny_model, run_dir, **SHORT), resume=True)
    assert "model.path" not in str(caught.value)


def test_a_failure_one_step_ahead_costs_no_finished_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(
        tiny_model, tmp_path / "r", **{**SHORT, "train__steps": 3, "train__save_every": 1}, rollout__staleness=1
    )
    sampled, calls = HFEngine.generate, iter(range(100))

    def lost(*arguments: Any) -> Any:
        if next(calls) == 2:  # after the evaluation and the first step: the second, during the first one's update
            raise EngineError("the engine is gone")
        return sampled(*arguments)

    monkeypatch.setattr(HFEngine, "generate", lost)
    with pytest.raises(EngineError, match="the engine is gone"):
        trainer.train(given)
    assert [run_dir.step_of(p) for p in checkpoint.list_checkpoints(tmp_path / "r")] == [1]
    trainer.train(given, resume=True)
    rows = read_metrics(tmp_path / "r")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["rollout/staleness"] for row in rows[1:]] == [0, 0, 1]


class Judge:
    """A reward that draws numbers and whose third call fails, once."""

    calls = 0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        self.calls += 1
        drawn = [random.random() for _ in rollouts]
        if self.calls == 3:
            raise TimeoutError("the judge did not answer")
        return drawn


judge = Judge()
no_judge = lambda rollouts: [random.random() for _ in rollouts]  # noqa: E731


def test_a_reward_that_fails_costs_no_finished_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    long: dict[str, Any] = {**SHORT, "train__steps": 4, "train__save_every": 0}
    given = config(tiny_model, tmp_path / "r", **long, reward={"source": "test_resume:judge"})
    with pytest.raises(
        UserError, match=r"TimeoutError.*; step 2 is saved in .*step_000002: continue with --resume \(resume"
    ):
        trainer.train(given)
    trainer.train(given, resume=True)
    trainer.train(config(tiny_model, tmp_path / "whole", **long, reward={"source": "test_resume:no_judge"}))
    assert trajectory(tmp_path / "r") == trajectory(tmp_path / "whole")


def test_an_engine_that_fails_in_an_evaluation_costs_no_finished_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tiny_model, tmp_path / "r", **{**SHORT, "train__eval_every": 1, "train__save_every": 0})
    sampled, calls = HFEngine.generate, iter(range(100))

    def lost(*arguments: Any) -> Any:
        if next(calls) == 2:  # the evaluation after the first step
            raise EngineError("the engine is gone")
        return sampled(*arguments)

    monkeypatch.setattr(HFEngine, "generate", lost)
    with pytest.raises(EngineError, match="the engine is gone; step 1 is saved"):
        trainer.train(given)
    trainer.train(given, resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [0, 1, 2]


def test_a_half_finished_update_is_not_saved(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = trainer.PPO._optimizer_step, iter(range(100))

    def broken(*arguments: Any) -> Any:
        if next(calls) == 5:  # of four in a step
            raise UserError("the loss failed")
        return step(*arguments)

    monkeypatch.setattr(trainer.PPO, "_optimizer_step", broken)
    with pytest.raises(UserError, match=r"^the loss failed$"):
        trainer.train(config(tiny_model, tmp_path / "r", **{**SHORT, "train__save_every": 0}))
    assert not checkpoint.list_checkpoints(tmp_path / "r")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("resume", [True, False])
def test_one_run_in_a_folder_at_a_time(tmp_path: Path, resume: bool) -> None:
    given = build_section({"run_dir": str(tmp_path)}, SFTConfig)
    if resume:
        empty_checkpoint(given, 1)
    ours, forked = os.pipe()
    with open_run_dir(given, resume):
        with pytest.raises(UserError, match=r"^run_dir = '.*' is in use by another run: wait for it, stop it, or"):
            sft.sft(given, resume=resume)
        child = os.fork()
        if child == 0:
            os.write(forked, b"!")
            signal.pause()
            os._exit(0)
        os.read(ours, 1)
    try:
        with open_run_dir(given, resume):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        os.close(forked)


def test_a_run_that_goes_on_is_named_before_what_it_has_saved(tmp_path: Path) -> None:
    given = build_section({"run_dir": str(tmp_path)}, SFTConfig)
    with open_run_dir(given, resume=False):
        with pytest.raises(UserError, match="is in use by another run"):
            sft.sft(given, resume=True)
        empty_checkpoint(given, 1)
        with pytest.raises(UserError, match="is in use by another run"):
            sft.sft(given)
    with pytest.raises(UserError, match="holds a run already"):
        sft.sft(given)


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[]", '{"config": 3}', '{"config', '{"config": {}, "mine": 1}', '{"config": {}, "step": true}',
        '{"config": {}, "step": 1.5}', '{"config": {}, "ppo": {"kl_coef": "0.1"}}', '{"config": {}, "best": {"steps": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_state_is_one_sentence(tmp_path: Path, content: str) -> None:
    given = build_section({"run_dir": str(tmp_path)}, SFTConfig)
    (empty_checkpoint(given, 1) / run_dir.COMPLETE).write_text(content)
    with pytest.raises(UserError, match=r"step_000001' is damaged \(.*\): remove it to resume the one before"):
        sft.sft(given, resume=True)


@pytest.mark.parametrize("content", ["[]", '{"model.path', "3"])
def test_damaged_hashes_are_one_sentence(tmp_path: Path, content: str) -> None:
    given = build_section({"run_dir": str(tmp_path), "model": {"path": "hub/name"}}, SFTConfig)
    empty_checkpoint(given, 1)
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(UserError, match=r"\.tppo-fast' is damaged \(.*\): remove it to resume without knowing"):
        sft.sft(given, resume=True)
    (tmp_path / MARKER).unlink()
    with open_run_dir(given, resume=True):
        pass


def test_checkpoints_are_ordered_by_number_and_dropped_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = build_section({"run_dir": str(tmp_path)}, SFTConfig)

    def steps() -> list[int]:
        return [run_dir.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)]

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    for step in (999_998, 999_999):
        empty_checkpoint(given, step, keep=2)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            empty_checkpoint(given, 1_000_000, keep=2)
    assert steps() == [999_999, 1_000_000]
    empty_checkpoint(given, 1_000_001, keep=2)
    assert steps() == [1_000_000, 1_000_001]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # what the kill left is gone, too


@pytest.mark.parametrize("full", [True, False], ids=["disk full", "no reader"])
def test_a_log_that_cannot_be_written_ends_nothing(tiny_model: Path, tmp_path: Path, full: bool) -> None:
    path = tmp_path / "c.toml"
    write_toml(path, values(tiny_model, tmp_path / "r", train__steps=2, train__show_examples=1))
    reader, pipe = os.pipe()
    os.close(reader)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with os.fdopen(pipe, "wb") as closed, Path("/dev/full").open("wb") as device:
        log = device if full else closed
        command = [sys.executable, "-m", "tppo_fast", "train", str(path)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, timeout=120)
    assert (done.returncode, "trained policy" in done.stdout) == (0, True)
