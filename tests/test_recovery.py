"""A lost live engine is replaced, unless the run was asked to stop; the live engines are stand-ins."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import prompt, tokenizer
from test_publish import Live

from tppo_fast import loading
from tppo_fast.errors import EngineError, EngineLost, UserError
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.publish import Policy
from tppo_fast.rollout.remote import RecoveringEngine

ASKED = [prompt([1, 2])], SamplingParams(max_new_tokens=4)


class Mortal(Live):
    """Dies at its first ``generate`` while ``sick``."""

    sick = True

    def generate(self, *asked: Any) -> Any:
        if self.sick:
            raise EngineLost("it died")
        return super().generate(*asked)

    def close(self) -> None:
        self.alive = False


class Starts:
    """Starts live engines, or fails as it is told."""

    def __init__(self, folder: Path) -> None:
        self.policy = Policy(str(folder), "float32")
        self.made: list[Mortal] = []
        self.failures: list[Exception] = []

    def __call__(self) -> Mortal:
        if self.failures:
            raise self.failures.pop()
        self.made.append(Mortal(self.policy))
        return self.made[-1]

    def engine(self, retries: int = 2) -> RecoveringEngine:
        return RecoveringEngine(self, self.policy, tokenizer(), max_model_len=64, bucket_bytes=1 << 20, retries=retries)


@pytest.fixture
def starts(wide_model: Path) -> Starts:
    return Starts(wide_model)


@pytest.fixture
def weights(wide_model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loading.load_causal_lm(str(wide_model)).state_dict().items()}


def test_no_engine_is_started_once_the_run_was_asked_to_stop(starts: Starts, weights: dict[str, torch.Tensor]) -> None:
    engine = starts.engine()
    engine.load_weights(weights.items(), 0)
    with InterruptGuard():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            engine.generate(*ASKED)
    assert len(starts.made) == 1
    starts.failures = [UserError("another guard's business")]
    with pytest.raises(EngineError):  # the guard is gone: engines are replaced again
        engine.generate(*ASKED)
    assert len(starts.made) > 1


def test_an_engine_that_does_not_start_again_at_once_is_tried_again(
    starts: Starts, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = starts.engine()
    engine.load_weights(weights.items(), 0)
    starts.failures = [UserError("no memory is free")]
    monkeypatch.setattr(Mortal, "sick", False)
    starts.made[0].close()
    assert engine.generate(*ASKED)[0].policy_version == 0
    assert engine.restarts == 1
    starts.made[1].close()
    starts.failures = [UserError("no memory is free")] * 3
    with pytest.raises(EngineError, match=r"no memory is free; the engine was replaced 2 times"):
        engine.generate(*ASKED)


def test_the_first_start_says_what_is_wrong(starts: Starts) -> None:
    starts.failures = [UserError("no such model")]
    with pytest.raises(UserError, match="no such model"):
        starts.engine()
