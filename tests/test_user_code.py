"""Engines and losses of a user that do not keep their side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_trainer import config

from tppo_fast import loading, losses, trainer
from tppo_fast.errors import UserError
from tppo_fast.rollout.hf_engine import HFEngine


def seven_rollouts(config: Any, tokenizer: Any, device: Any) -> Any:
    del device
    lm = loading.load_causal_lm(config.model.path)
    engine = HFEngine(lm, tokenizer)
    generate = engine.generate
    engine.generate = lambda *a: generate(*a)[:7]  # type: ignore[method-assign]
    return engine


def test_an_engine_that_does_not_answer_what_it_was_asked(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="answered 4 prompts with 7 rollouts that are not 2 of each"):
        trainer.train(
            config(tiny_model, tmp_path / "r", rollout__engine="test_user_code:seven_rollouts", train__eval_prompts=1)
        )


@losses.row_local
def meddling_loss(*args: Any) -> Any:
    out = losses.ppo(*args)
    return replace(out, metrics=out.metrics | {"actions": out.loss.detach()})


@losses.row_local
def number_loss(*args: Any) -> Any:
    out = losses.ppo(*args)
    return replace(out, metrics=out.metrics | {"mine": 1.0})


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("meddling_loss", "metric 'actions'"), ("number_loss", r"metric 'mine' = 1\.0: give a tensor")],
)
def test_metrics_of_a_loss_that_would_spoil_the_log(tiny_model: Path, tmp_path: Path, loss: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        trainer.train(config(tiny_model, tmp_path / "r", ppo__loss=f"test_user_code:{loss}", train__steps=1))
