"""A lost live engine is replaced, unless the run was asked to stop; the live engines are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import prompt, tokenizer
from test_publish import Live

from tppo_fast import loading
from tppo_fast.child import Child, receive, send, serve
from tppo_fast.errors import EngineError, EngineLost, UserError
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.rollout import bucket_file
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.publish import Policy
from tppo_fast.rollout.remote import RecoveringEngine, RemoteLive

CRASH = """
import os, pathlib, sys, torch
from tppo_fast.rollout import bucket_file
bucket_file.SHARED = pathlib.Path(sys.argv[1])
with bucket_file.bucket_file([("w", torch.ones(2))]):
    os._exit(1)
"""
ASKED = [prompt([1, 2])], SamplingParams(max_new_tokens=4)


class Mortal(Live):
    """Dies at its first ``generate`` while ``sick``."""

    sick = True

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, stop: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        if self.sick:
            raise EngineLost("it died")
        return super().generate(prompts, sampling, stop)

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
    with InterruptGuard("soon"):
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


def test_what_is_published_again_is_what_was_published(
    starts: Starts, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer has moved on by then; the copy is in the engine's dtype, which is what travels."""
    starts.policy.dtype = "bfloat16"
    monkeypatch.setattr(Mortal, "sick", False)
    engine = starts.engine()
    for _ in range(2):
        engine.load_weights(weights.items(), 0)
    published = {name: tensor.bfloat16() for name, tensor in weights.items() if name != "lm_head.weight"}
    for tensor in weights.values():
        tensor.fill_(0.5)
    starts.made[0].close()
    engine.generate(*ASKED)
    assert len(starts.made) == 2
    again = starts.made[1].weights
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())
    assert {tensor.dtype for tensor in again.values()} == {torch.bfloat16}


def test_without_retries_nothing_is_kept(starts: Starts, weights: dict[str, torch.Tensor]) -> None:
    engine = starts.engine(retries=0)
    engine.load_weights(weights.items(), 0)
    assert not engine._kept
    with pytest.raises(EngineError, match="it died; the engine was replaced 0 times"):
        engine.generate(*ASKED)
    with pytest.raises(UserError, match="before load_weights"):
        engine.generate(*ASKED)


def test_what_a_killed_process_left_in_shared_memory_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_file, "SHARED", tmp_path)
    subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    with bucket_file.bucket_file([("w", torch.ones(3))]) as file:
        assert not left.exists()
        assert torch.equal(load_file(file)["w"], torch.ones(3))
        assert file.parent.stat().st_mode & 0o077 == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("operation", "error"), [("finish_update", EngineLost), ("sleep", EngineError)])
def test_a_worker_in_which_an_update_failed_is_lost(operation: str, error: type[EngineError]) -> None:
    """It may hold part of two policies; what fails elsewhere would fail again in another worker."""
    ours, theirs = Pipe()
    send(theirs, {"id": 1, "error": "OutOfMemoryError: none left"})  # type: ignore[arg-type]
    live = object.__new__(RemoteLive)
    live._timeout, live._count = 5.0, 0
    connection: Any = ours
    live._child = Child(subprocess.Popen([sys.executable, "-c", ""]), "the rollout worker", b"", [connection])
    with pytest.raises(error, match=r"failed in the rollout worker: OutOfMemoryError: none left") as caught:
        live._ask(operation)
    assert type(caught.value) is error
    live.close()


def test_an_operation_that_fails_is_answered_and_the_next_one_too() -> None:
    ours, theirs = Pipe()
    known: Any = {"read": lambda a: (Path(a["file"]).read_text(), None)}
    answering = threading.Thread(target=serve, args=(theirs, known))
    answering.start()
    for name, expected in (("/no/where", {"error": "FileNotFoundError"}), (__file__, {"result": '"""'})):
        send(ours, {"id": 1, "operation": "read", "arguments": {"file": name}})
        reply, _ = receive(ours)
        assert {key: reply[key][: len(value)] for key, value in expected.items()} == expected
    ours.close()
    answering.join(5)
    assert not answering.is_alive()
