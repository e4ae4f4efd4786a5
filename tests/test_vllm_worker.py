"""vLLM in a process of its own: it may be killed at any moment, and nothing is lost or counted twice."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_rollout
from forked_worker import forked_workers
from support import no_vllm, tokenizer
from test_vllm import build, disturb, gap, load_actor, params

from tppo_fast import config as settings
from tppo_fast import trainer
from tppo_fast.data_types import Prompt
from tppo_fast.errors import EngineError, EngineLost, UserError
from tppo_fast.metrics import read_metrics
from tppo_fast.rollout.remote import RemoteLive

pytestmark = pytest.mark.skipif(no_vllm() is not None, reason=str(no_vllm()))


@pytest.fixture(scope="module", autouse=True)
def started(wide_model: Path) -> Iterator[Any]:
    """An engine whose worker was started as a user's is; all later workers are forked."""
    with contextlib.closing(build(wide_model, process="worker", bucket_mib=1)) as made, forked_workers():
        yield made


@pytest.fixture(scope="module")
def engine(started: Any) -> Any:
    return started


@pytest.fixture
def actor(wide_model: Path) -> Any:
    return load_actor(wide_model)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    tok = tokenizer()
    return [
        Prompt(token_ids=tok.encode(t), user_id=t, history=(t,), next_queries=("x",), relevant_queries=("x",))
        for t in ("pasta", "lisbon hotels")
    ]


def kill_at(monkeypatch: pytest.MonkeyPatch, *moments: tuple[str, int]) -> list[str]:
    """SIGKILL the worker right after the n-th request of a kind was sent; returns what was killed."""
    seen: dict[str, int] = {}
    killed: list[str] = []

    def sent(self: RemoteLive, operation: str) -> None:
        seen[operation] = seen.get(operation, 0) + 1
        if (operation, seen[operation]) in moments:
            killed.append(operation)
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(RemoteLive, "_sent", sent)
    return killed


def test_it_samples_like_the_colocated_engine(engine: Any, actor: Any, prompts: list[Prompt]) -> None:
    for version in range(3):
        disturb(actor, version)
        engine.load_weights(actor.named_weights(), version)
        assert gap(actor, engine, prompts, params()) < 1e-3


def test_killed_while_weights_arrive_the_answers_are_the_same(
    engine: Any, actor: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it loads and again while it is checked; the run of 10 steps kills it at other moments."""
    disturb(actor, 9)
    engine.load_weights(actor.named_weights(), 1)
    expected = engine.generate(prompts, params())
    killed = kill_at(monkeypatch, ("finish_update", 1), ("probe", 1))
    before = engine.restarts
    engine.load_weights(actor.named_weights(), 1)
    assert engine.generate(prompts, params()) == expected
    assert killed == ["finish_update", "probe"]
    assert engine.restarts == before + 2


def test_the_worker_outlives_what_tells_the_trainer_to_stop(engine: Any, actor: Any, prompts: list[Prompt]) -> None:
    """A scheduler sends SIGTERM to every process of a run; the trainer wants to save first."""
    engine.load_weights(actor.named_weights(), 1)
    before = engine.restarts
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(engine.live.pid, number)
    assert gap(actor, engine, prompts, params()) < 1e-3
    assert engine.restarts == before


def test_it_gives_up_with_one_sentence(
    engine: Any, actor: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load_weights(actor.named_weights(), 1)
    monkeypatch.setattr(engine, "_retries", 1)
    killed = kill_at(monkeypatch, *(("generate", n) for n in range(1, 9)))
    with pytest.raises(
        EngineError, match=r"died during generate \(request \d+\).*the engine was replaced 1 times"
    ) as caught:
        engine.generate(prompts, params())
    assert killed == ["generate"] * 2
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert gap(actor, engine, prompts, params()) < 1e-3  # and can be used again


def test_a_request_that_hangs_is_named_and_repeated(
    engine: Any, actor: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load_weights(actor.named_weights(), 1)
    monkeypatch.setattr(engine, "_retries", 0)
    monkeypatch.setattr(engine.live, "_timeout", 0.5)
    os.kill(engine.live.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"generate \(request \d+\) was not answered within 0\.5 s"):
        engine.generate(prompts, params())
    monkeypatch.undo()
    assert gap(actor, engine, prompts, params()) < 1e-3


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, wide_model: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((wide_model / name).read_bytes())
    with pytest.raises(UserError, match="vLLM cannot start with it"):
        build(tmp_path, process="worker")


def test_a_worker_that_takes_too_long_to_start_is_lost(wide_model: Path) -> None:
    with pytest.raises(EngineLost, match=r"did not start within 0\.01 s"):
        build(wide_model, process="worker", timeout=0.01)


def test_sleeping_in_place_keeps_the_worker(
    engine: Any, actor: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request alone: on a CPU vLLM has nothing to free. A worker that dies of it is replaced."""
    engine.load_weights(actor.named_weights(), 1)
    expected, pid = engine.generate(prompts, params()), engine.live.pid
    monkeypatch.setattr(engine.live, "_in_place", True)
    engine.sleep()
    with pytest.raises(UserError, match="before load_weights"):
        engine.generate(prompts, params())
    engine.load_weights(actor.named_weights(), 1)
    assert engine.generate(prompts, params()) == expected
    assert engine.live.pid == pid
    killed = kill_at(monkeypatch, ("sleep", 1))
    engine.sleep()
    assert killed == ["sleep"]
    engine.load_weights(actor.named_weights(), 1)
    assert engine.generate(prompts, params()) == expected
    assert engine.live.pid != pid


def test_stop_frees_everything_and_the_next_publication_starts_again(
    engine: Any, actor: Any, prompts: list[Prompt]
) -> None:
    engine.load_weights(actor.named_weights(), 1)
    expected, pid = engine.generate(prompts, params()), engine.live.pid
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert resident > 300 << 20  # what it frees: all of this
    print(f"the sleeping worker gave back {resident / 2**20:.0f} MiB")
    engine.sleep()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(UserError, match="before load_weights"):
        engine.generate(prompts, params())
    engine.load_weights(actor.named_weights(), 1)
    assert engine.generate(prompts, params()) == expected


LEARNED = ("ppo/policy_loss", "ppo/value_loss", "ppo/grad_norm", "ppo/kl", "rollout/reward_mean", "rollout/length_mean")


def run(folder: Path, run_dir: Path, *, steps: int = 10, staleness: int = 0, **vllm: Any) -> list[tuple[float, ...]]:
    values = {
        "run_dir": str(run_dir),
        "threads": 1,
        "device": "cpu",
        "model": {"path": str(folder)},
        "data": {"synthetic_sessions": 40, "max_prompt_tokens": 180},
        "rollout": {
            "engine": "vllm", "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8, "staleness": staleness,
        },
        "vllm": {"process": "worker", "kv_cache_gib": 0.05, **vllm},
        "ppo": {"lr": 1e-3, "minibatches": 2},
        "train": {
            "steps": steps, "eval_every": 0, "eval_prompts": 4, "save_every": 0, "show_examples": 0, "tensorboard": False,
        },
    }  # fmt: skip
    trainer.train(settings.build(values))
    rows = [row for row in read_metrics(run_dir) if row["step"] > 0]
    assert len(rows) == steps
    assert staleness or all(row["parity/max"] < 1e-3 for row in rows)
    return [tuple(row[name] for name in LEARNED) for row in rows]


@pytest.fixture(scope="module")
def colocated(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    return run(wide_model, tmp_path_factory.mktemp("runs") / "colocated", process="colocated")


def test_10_steps_with_a_killed_worker_equal_a_colocated_run(
    wide_model: Path, tmp_path: Path, colocated: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = kill_at(monkeypatch, ("generate", 5), ("update", 8))
    assert run(wide_model, tmp_path / "killed") == colocated
    assert len(colocated) == 10
    assert killed == ["generate", "update"]


class TestWorkerConformance(test_rollout.TestConformance):
    """The suite of every engine, on one worker that is replaced where a test closed it."""

    @pytest.fixture
    def engine(self, engine: Any) -> Any:
        engine._version = None
        return engine


def test_one_step_ahead_with_a_killed_worker_is_the_same_run(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(wide_model, tmp_path / "undisturbed", steps=5, staleness=1, process="colocated")
    killed = kill_at(monkeypatch, ("generate", 3))
    assert run(wide_model, tmp_path / "killed", steps=5, staleness=1) == expected
    assert killed == ["generate"]


def test_a_run_that_sleeps_during_the_update_is_the_same_run(
    wide_model: Path, tmp_path: Path, colocated: list[tuple[float, ...]]
) -> None:
    assert run(wide_model, tmp_path / "asleep", steps=2, sleep="stop") == colocated[:2]
