"""A run shared by real processes: the same run, stopped, resumed and ended as one; a process that fails is named."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from test_trainer import wait_for_step, write_toml

from tppo_fast import checkpoint, leader, losses, trainer
from tppo_fast import config as settings
from tppo_fast.data_types import LossOutput, Prompt, Rollout
from tppo_fast.errors import ProcessFailed, UserError
from tppo_fast.loading import load_causal_lm
from tppo_fast.metrics import read_metrics
from tppo_fast.reward_model.run import train_reward_model
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rewards.model_source import ModelReward
from tppo_fast.rollout import SamplingParams
from tppo_fast.rollout.hf_engine import HFEngine
from tppo_fast.sections import build_section
from tppo_fast.seeding import derive

LEARNED = ("ppo/policy_loss", "ppo/value_loss", "ppo/grad_norm", "ppo/kl", "rollout/reward_mean", "rollout/length_mean")


def values(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few seconds."""
    base: dict[str, Any] = {
        "run_dir": str(run_dir),
        "processes": 2,
        "threads": 1,
        "device": "cpu",
        "model": {"path": str(folder)},
        "data": {"synthetic_sessions": 40, "max_prompt_tokens": 180},
        "rollout": {"prompts_per_step": 5, "samples_per_prompt": 2, "max_new_tokens": 8},
        "ppo": {"lr": 1e-3, "minibatches": 2},
        "train": {
            "steps": 4,
            "eval_every": 0,
            "eval_prompts": 5,
            "save_every": 2,
            "show_examples": 0,
            "tensorboard": False,
        },
    }
    for name, value in changes.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return base


def train(folder: Path, run_dir: Path, resume: bool = False, **changes: Any) -> list[dict[str, Any]]:
    trainer.train(settings.build(values(folder, run_dir, **changes)), resume=resume)
    return [row for row in read_metrics(run_dir) if row["step"]]


def trajectory(rows: Sequence[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in LEARNED) for row in rows]


def in_follower() -> bool:
    return "tppo_fast.follow" in sys.argv[0] or Path(sys.argv[0]).stem == "follow"


class ByPrompt:
    """Samples each prompt with a seed of its own, so that who samples it does not matter."""

    def __init__(self, config: settings.Config, tokenizer: Any, device: torch.device) -> None:
        del device
        self._engine = HFEngine(load_causal_lm(config.model.path, trust_remote_code=False), tokenizer)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        seeds = {p.history: derive(0, *p.history) for p in prompts}
        found = [self._engine.generate([p], replace(sampling, seed=seeds[p.history])) for p in prompts]
        return [rollout for rollouts in found for rollout in rollouts]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.load_weights(weights, version)

    def close(self) -> None:
        self._engine.close()


def refusing_engine(config: settings.Config, tokenizer: Any, device: torch.device) -> ByPrompt:
    if in_follower():
        raise UserError("this engine runs once")
    return ByPrompt(config, tokenizer, device)


class FailsLater(ByPrompt):
    """In the second step that it samples, of the process that the environment names."""

    calls = 0

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        self.calls += 1
        if self.calls == 3 and in_follower() == (
            os.environ["FAILS"] != "leader"
        ):  # the first call was of an evaluation
            raise SystemExit if os.environ["FAILS"] == "exit" else ArithmeticError("no more luck")
        return super().generate(prompts, sampling)


def failing_loss(evaluation: Any, batch: Any, config: Any, kl_coef: float, train_policy: bool) -> LossOutput:
    if in_follower():
        raise MemoryError("none left")
    return losses.ppo(evaluation, batch, config, kl_coef, train_policy)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[leader.Leader]]:
    """The leaders of this test, none of whose processes may be left at its end."""
    found: list[leader.Leader] = []
    original = leader.Leader.__enter__

    def enter(self: leader.Leader) -> leader.Leader:
        found.append(self)
        return original(self)

    monkeypatch.setattr(leader.Leader, "__enter__", enter)
    yield found
    assert found
    assert all(follower.process.returncode is not None for made in found for follower in made._followers)
    assert not any(made._folder.exists() for made in found)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hardly trained."""
    folder = tmp_path_factory.mktemp("rm")
    wanted = {
        "run_dir": str(folder / "run"),
        "resamples": 20,
        "backbone": {"scratch": "decoder"},
        "data": {"labels": str(planted.write(folder / "labels.jsonl", 100))},
        "train": {"epochs": 1, "batch_size": 32},
    }
    return train_reward_model(build_section(wanted, RewardModelConfig)).folder


def test_two_processes_train_as_one_does(
    tiny_model: Path, reward_model: Path, tmp_path: Path, started: list[leader.Leader], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    original = ModelReward.score
    monkeypatch.setattr(ModelReward, "score", lambda self, given: (scored.append(len(given)), original(self, given))[1])
    same = {
        "rollout": {"engine": "test_processes:ByPrompt"},
        "reward": {"source": "model", "model": str(reward_model), "value": "soft"},
    }
    one = train(tiny_model, tmp_path / "one", processes=1, **same)
    two = train(tiny_model, tmp_path / "two", **same)
    assert len(started) == 1
    assert scored == [10] * 4 + [5] * 4
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for mine, expected in zip(trajectory(two), trajectory(one), strict=True):
        assert mine == pytest.approx(expected, rel=2e-3, abs=2e-5)
    for name in ("perf/update_tokens", "perf/update_tflop", "perf/prepare_tokens"):
        assert two[0][name] == pytest.approx(one[0][name], rel=0.01)


@pytest.mark.usefixtures("started")
def test_it_resumes_bit_for_bit_with_rollouts_one_step_ahead(tiny_model: Path, tmp_path: Path) -> None:
    ahead = {"staleness": 1}
    whole = train(tiny_model, tmp_path / "whole", rollout=ahead)
    first = {"steps": 4, "keep_checkpoints": 1}

    def stop_at_two(step: int, _: Any) -> bool:
        return step == 2

    trainer.train(settings.build(values(tiny_model, tmp_path / "r", rollout=ahead, train=first)), on_step=stop_at_two)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "r")] == ["step_000002"]
    shutil.copytree(tmp_path / "r", tmp_path / "alone")
    assert trajectory(train(tiny_model, tmp_path / "r", resume=True, rollout=ahead)) == trajectory(whole)
    assert len(train(tiny_model, tmp_path / "alone", resume=True, rollout=ahead, processes=1)) == 4


def test_a_process_that_dies_ends_the_run_with_a_checkpoint(
    tiny_model: Path, tmp_path: Path, started: list[leader.Leader]
) -> None:
    def kill(step: int, _: Any) -> None:
        if step == 1:
            started[0]._followers[0].process.kill()

    config = settings.build(values(tiny_model, tmp_path / "r", train={"save_every": 0}))
    with pytest.raises(ProcessFailed, match=r"process 2 of 2 ended during \w+ \(exit code -9\)"):
        trainer.train(config, on_step=kill)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "r")] == ["step_000001"]


@pytest.mark.usefixtures("started")
def test_a_process_that_fails_says_why(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match=r"update failed in process 2 of 2: MemoryError: none left"):
        train(tiny_model, tmp_path / "r", ppo={"loss": "test_processes:failing_loss"})
    assert not checkpoint.list_checkpoints(tmp_path / "r")


@pytest.mark.parametrize(
    ("who", "error", "said"),
    [
        (
            "follower",
            UserError,
            r"FailsLater' failed with ArithmeticError \(no more luck.* \(in process 2 of 2\); step 1 is saved",
        ),
        ("leader", UserError, r"FailsLater' failed with ArithmeticError \(no more luck\) at [^(]*; step 1 is saved"),
        ("exit", ProcessFailed, r"process 2 of 2 ended during \w+ \(exit code 1\)"),
    ],
)
@pytest.mark.usefixtures("started")
def test_an_engine_that_fails_while_the_policy_learns_costs_no_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, error: type[Exception], said: str
) -> None:
    monkeypatch.setenv("FAILS", who)
    engine = {"engine": "test_processes:FailsLater", "staleness": 1}
    with pytest.raises(error, match=said):
        train(tiny_model, tmp_path / "r", rollout=engine, train={"save_every": 0})
    if who != "exit":  # it takes the process, in the middle of its update, with it
        assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "r")] == ["step_000001"]


@pytest.mark.usefixtures("started")
def test_a_process_that_cannot_be_built_says_why(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this engine runs once \(in process 2 of 2\)"):
        train(tiny_model, tmp_path / "r", rollout={"engine": "test_processes:refusing_engine"})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"processes": 3}, r"processes = 3: each takes part of every minibatch, which holds the responses to 2 prompts"),
        ({"processes": 0}, r"processes = 0"),
        ({"vllm": {"process": "server", "url": "http://a"}, "rollout": {"engine": "vllm"}}, r"processes = 2 with vllm\.process"),
        ({"ppo": {"loss": "__main__:loss"}}, r"ppo\.loss = '__main__:loss' with processes = 2: the other processes"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "loss", losses.ppo, raising=False)
    with pytest.raises(UserError, match=expected):
        train(tiny_model, tmp_path / "r", **changes)
    assert not (tmp_path / "r").exists()


def test_each_process_has_a_gpu_of_its_own(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert [leader._others_gpu(rank) for rank in range(3)] == ["6", "4", "7"]
    config = settings.build(values(tiny_model, tmp_path / "r", processes=4, ppo={"minibatches": 1}))
    with pytest.raises(UserError, match=r"processes = 4, but torch sees 3 GPUs"):
        leader.Leader(config, None, torch.device("cuda"))


def followers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_leaves_no_process_behind(tiny_model: Path, tmp_path: Path, number: int, code: int) -> None:
    path = tmp_path / "c.toml"
    write_toml(path, values(tiny_model, tmp_path / "r", train={"steps": 10_000, "save_every": 0}))
    process = subprocess.Popen(
        [sys.executable, "-m", "tppo_fast", "train", str(path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    wait_for_step(tmp_path / "r", 1, process)
    followers = followers_of(process.pid)
    assert followers
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert len(checkpoint.list_checkpoints(tmp_path / "r")) == (number == signal.SIGINT)
    gone(followers)


def test_a_signal_while_a_run_is_set_up_leaves_no_process_behind(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    write_toml(path, values(tiny_model, tmp_path / "r"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tppo_fast", "train", str(path)], stderr=subprocess.PIPE, text=True
    )
    while not (followers := followers_of(process.pid)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)  # until the last process has closed it
    assert process.returncode == 130, said
    assert "Traceback" not in said
    gone(followers)


def gone(followers: list[int]) -> None:
    """Wait until they are."""
    for follower in followers:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if "\nState:\tZ" not in Path(f"/proc/{follower}/status").read_text():
                    time.sleep(0.1)
                    continue
            break
        else:
            pytest.fail(f"{follower} is still there")
