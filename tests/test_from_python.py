"""A run from Python: the caller's process stays as it was, and a callback looks on."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import config, trajectory

from tppo_fast import checkpoint, dpo, run_dir, seeding, sft, trainer
from tppo_fast.data.sessions import Session, write_sessions
from tppo_fast.data.synthetic import generate_sessions
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.metrics import read_metrics
from tppo_fast.reward_model.run import train_reward_model


@pytest.fixture(scope="module")
def whole_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train(config(tiny_model, run_dir))
    return run_dir


def test_the_callers_generators_and_threads_stay_as_they_were(tiny_model: Path, tmp_path: Path) -> None:
    def drawn() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), torch.rand(()).item(), torch.get_num_threads()

    before, given = seeding.global_state(), config(tiny_model, tmp_path / "r", threads=2, train__steps=1)
    expected = drawn()
    seeding.set_global_state(before)
    trainer.train(given)
    assert drawn() == expected
    with pytest.raises(UserError, match="holds a run already"):
        trainer.train(given)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_what_torch_is_set_to_outside_does_not_matter(
    tiny_model: Path, whole_run: Path, tmp_path: Path, without: Any
) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with without():
            trainer.train(config(tiny_model, tmp_path / "r"))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert trajectory(tmp_path / "r") == trajectory(whole_run)


def test_a_callback_sees_every_step_and_may_end_the_run(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def third(step: int, metrics: dict[str, float]) -> bool:
        seen.append((step, metrics["ppo/kl"]))
        return step == 3

    given = config(tiny_model, tmp_path / "r", train__save_every=0)
    result = trainer.train(given, on_step=third)
    assert seen == [(row["step"], row["ppo/kl"]) for row in read_metrics(tmp_path / "r")[1:]]
    assert [run_dir.step_of(p) for p in checkpoint.list_checkpoints(tmp_path / "r")] == [3]
    assert result.policy.is_dir()
    assert "eval/relevance" in result.evaluation
    trainer.train(given, resume=True)
    assert trajectory(tmp_path / "r") == trajectory(whole_run)


def test_a_callback_that_fails_costs_no_step(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    def unreachable(step: int, _: object) -> None:
        if step == 3:
            raise ConnectionError("no route")

    given = config(tiny_model, tmp_path / "r", train__save_every=0)
    with pytest.raises(ConnectionError, match="no route") as caught:
        trainer.train(given, on_step=unreachable)
    (saved,) = checkpoint.list_checkpoints(tmp_path / "r")
    assert caught.value.__notes__ == [f"step 3 is saved in {saved}: continue with --resume (resume=True)"]
    trainer.train(given, resume=True)
    assert trajectory(tmp_path / "r") == trajectory(whole_run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"on_step": 3}, "on_step = 3: give a function"),
        ({"profile": -1}, "profile = -1: give a number of steps"),
        ({"resume": "no"}, "resume = 'no': give True"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_refused_first(
    tiny_model: Path, tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        trainer.train(config(tiny_model, tmp_path / "r"), **arguments)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("run", [trainer.train, sft.sft, dpo.dpo, train_reward_model])
def test_every_run_takes_the_same_kinds_of_config(run: Any) -> None:
    with pytest.raises(UserError, match=r"config = 3: give a .*, a dict of settings, or the path of a TOML file"):
        run(3)
    with pytest.raises(UserError, match="unknown setting 'nope'"):
        run({"nope": 1})


def test_one_thread_of_a_process_runs_at_a_time(tiny_model: Path, tmp_path: Path) -> None:
    given = config(tiny_model, tmp_path / "r", train__steps=1)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with seeding.restored():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    with pytest.raises(UserError, match="another thread of this process is in a run"):
        trainer.train(given)
    done.set()
    thread.join()
    assert not (tmp_path / "r").exists()
    assert trainer.train(given).policy.is_dir()


def random_reward(rollouts: Sequence[Rollout]) -> list[float]:
    return [random.random() for _ in rollouts]


def test_held_out_responses_are_rewarded_where_it_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    for held_out in (False, True):
        reward = {"source": "test_from_python:random_reward", "held_out": held_out}
        trainer.train(config(tiny_model, tmp_path / str(held_out), train__steps=2, train__eval_every=1, reward=reward))
        rows = read_metrics(tmp_path / str(held_out))
        assert ["eval/reward_mean" in row for row in rows] == [held_out] * 3
    assert trajectory(tmp_path / "True") == trajectory(tmp_path / "False")


def test_next_queries_that_the_model_has_no_room_for(tiny_model: Path, tmp_path: Path) -> None:
    sessions = generate_sessions(20, seed=0)
    long = Session(user_id="wordy", history={"search": ["a"]}, next_queries=["word " * 400])
    write_sessions(tmp_path / "data.jsonl", [*sessions, long])
    data = {"train": str(tmp_path / "data.jsonl"), "eval_fraction": 0.3}
    with pytest.raises(
        UserError, match=r"^user 'wordy': next_queries have 2\d\d\d tokens; .*; or shorten or remove that"
    ):
        sft.sft({"run_dir": str(tmp_path / "r"), "model": {"path": str(tiny_model)}, "data": data})
