"""The run as a whole: it learns what it is paid for, resumes bit for bit after SIGKILL, stops cleanly on SIGINT."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tppo_fast import checkpoint, trainer
from tppo_fast import config as settings
from tppo_fast.data_types import Rollout
from tppo_fast.errors import EngineError, TrainingDiverged, UserError
from tppo_fast.metrics import GLOSSARY, read_metrics
from tppo_fast.rollout.hf_engine import HFEngine

LEARNED = ("ppo/policy_loss", "ppo/value_loss", "ppo/grad_norm", "ppo/kl", "rollout/reward_mean", "rollout/length_mean")


def values(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few seconds."""
    base: dict[str, Any] = {
        "run_dir": str(run_dir),
        "threads": 1,
        "device": "cpu",
        "model": {"path": str(folder)},
        "data": {"synthetic_sessions": 40, "max_prompt_tokens": 180},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8},
        "ppo": {"lr": 1e-3, "minibatches": 2, "kl_target": 0.05, "lr_schedule": "linear"},
        "train": {
            "steps": 6,
            "eval_every": 3,
            "eval_prompts": 4,
            "save_every": 2,
            "show_examples": 0,
            "tensorboard": False,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            base.setdefault(section, {})[name] = value
        else:
            base[section] = value
    return base


def config(folder: Path, run_dir: Path, **changes: Any) -> settings.Config:
    return settings.build(values(folder, run_dir, **changes))


def trajectory(run_dir: Path) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in LEARNED) for row in read_metrics(run_dir) if row["step"] > 0]


def pay_for_first_letter(rollouts: Sequence[Rollout]) -> list[float]:
    """A scalar reward: 1 when the response starts with the token that is easiest to make likely."""
    return [float(r.token_ids[0] % 2 == 0) for r in rollouts]


def not_a_loss(*_: Any) -> float:
    return 0.0


def broken_reward(rollouts: Sequence[Rollout]) -> list[float]:
    return [float("nan")] * len(rollouts)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def whole_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train(config(tiny_model, run_dir))
    return run_dir


def test_a_run_leaves_what_it_promises(whole_run: Path) -> None:
    rows = read_metrics(whole_run)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval/relevance" in row] == [0, 3, 6]
    assert {name for row in rows for name in row} - {"step"} <= set(GLOSSARY)
    assert [p.name for p in checkpoint.list_checkpoints(whole_run)] == ["step_000004", "step_000006"]  # keeps 2
    assert not list(whole_run.rglob("*.tmp"))
    assert not [p for p in whole_run.rglob("*") if p.suffix in {".pt", ".bin", ".pkl", ".pth"}]
    lm = transformers.AutoModelForCausalLM.from_pretrained(whole_run / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole_run / "policy")
    out = lm.generate(**tokenizer("lisbon hotels", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 3
    assert rows[1]["parity/max"] < 1e-3
    assert rows[1]["ppo/ratio"] == pytest.approx(1.0, abs=0.2)


def test_an_error_after_the_engine_started_ends_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[None] = []
    monkeypatch.setattr(HFEngine, "close", lambda _: closed.append(None))
    with pytest.raises(UserError, match="expected a finite number"):
        trainer.train(config(tiny_model, tmp_path / "r", reward={"source": "test_trainer:broken_reward"}))
    assert len(closed) == 1


def test_same_seed_same_run(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    trainer.train(config(tiny_model, tmp_path / "again"))
    assert trajectory(tmp_path / "again") == trajectory(whole_run)
    trainer.train(config(tiny_model, tmp_path / "other", seed=1))
    assert trajectory(tmp_path / "other") != trajectory(whole_run)


def test_sharing_prompts_changes_only_rounding(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    trainer.train(config(tiny_model, tmp_path / "r", model__share_prompts=False))
    for row, shared in zip(trajectory(tmp_path / "r")[:1], trajectory(whole_run), strict=False):
        assert row == pytest.approx(shared, rel=1e-3, abs=1e-5)


def test_learns_what_it_is_paid_for(tiny_model: Path, tmp_path: Path) -> None:
    trainer.train(
        config(
            tiny_model, tmp_path / "r", ppo={"lr": 1e-2, "kl_placement": "off", "epochs": 3},
            reward={"source": "test_trainer:pay_for_first_letter"},
            rollout={"prompts_per_step": 8, "samples_per_prompt": 8, "max_new_tokens": 1}, train__steps=25, train__eval_every=0,
        )
    )  # fmt: skip
    paid = [row["rollout/reward_mean"] for row in read_metrics(tmp_path / "r") if row["step"] > 0]
    assert sum(paid[:2]) / 2 < 0.65
    assert sum(paid[-2:]) / 2 > 0.9


def start(path: Path, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tppo_fast", "train", str(path), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed, once it ended."""
    with process:
        return process.communicate(timeout=120)


def write_toml(path: Path, data: dict[str, Any]) -> None:
    flat = {k: v for k, v in data.items() if not isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in flat.items()]
    for name, section in data.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in section.items())]
    path.write_text("\n".join(lines))


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a step is in the metrics."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(
        f"step {step} was not reached: {process.communicate()[1] if process.poll() is not None else ''}"
    )


def test_killed_and_resumed_is_bitwise_the_same(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    path, run_dir = tmp_path / "c.toml", tmp_path / "killed"
    write_toml(path, values(tiny_model, run_dir))
    process = start(path)
    wait_for_step(run_dir, 3, process)  # step 2 is saved; 3 is logged and will be done again
    process.send_signal(signal.SIGKILL)
    finish(process)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ppo/po')  # as a kill in the middle of a write leaves it
    resumed = start(path, "--resume")
    out, err = finish(resumed)
    assert resumed.returncode == 0, err
    assert "trained policy" in out
    assert trajectory(run_dir) == trajectory(whole_run)
    final = [(r / "policy" / "model.safetensors").read_bytes() for r in (run_dir, whole_run)]
    assert final[0] == final[1]


def test_sigint_saves_and_exits_130(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    path, run_dir = tmp_path / "c.toml", tmp_path / "interrupted"
    write_toml(path, values(tiny_model, run_dir, train__save_every=0))
    process = start(path)
    wait_for_step(run_dir, 1, process)
    process.send_signal(signal.SIGINT)
    _, err = finish(process)
    assert process.returncode == 130, err
    assert "\nstopping before the next update, with a checkpoint of the last finished step; once more" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert len(checkpoint.list_checkpoints(run_dir)) == 1
    trainer.train(config(tiny_model, run_dir, train__save_every=0), resume=True)
    assert trajectory(run_dir) == trajectory(whole_run)


def test_resume_refuses_what_would_change_the_run(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ppo\.lr = 0\.5"):
        trainer.train(config(tiny_model, whole_run, ppo__lr=0.5), resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        trainer.train(config(tiny_model, whole_run))
    with pytest.raises(UserError, match="no checkpoint to resume"):
        trainer.train(config(tiny_model, tmp_path / "new"), resume=True)
    older = checkpoint.list_checkpoints(whole_run)[0]
    others: list[Any] = [older, str(older), 4]
    for what in others:
        with pytest.raises(UserError, match="give True, to continue the newest checkpoint"):
            trainer.train(config(tiny_model, whole_run), resume=what)


def test_a_damaged_checkpoint_is_named(tiny_model: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    trainer.train(config(tiny_model, run_dir, train__steps=2, train__eval_every=0))
    newest = checkpoint.list_checkpoints(run_dir)[-1]
    (newest / "optimizer.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"step_000002.*cannot be loaded"):
        trainer.train(config(tiny_model, run_dir, train__steps=2), resume=True)
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"ppo": []}))
    with pytest.raises(UserError, match=r"step_000002' is damaged \(state\.json has a list as ppo\): remove it"):
        trainer.train(config(tiny_model, run_dir, train__steps=2), resume=True)


def test_a_resumed_run_ends_where_its_schedule_does(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.steps = 8, but the run has 6, over which ppo\.lr_schedule = 'linear'"):
        trainer.train(config(tiny_model, whole_run, train__steps=8), resume=True)
    with pytest.raises(UserError, match=r"train\.steps = 5, but the run stands at step 6"):
        trainer.train(config(tiny_model, whole_run, train__steps=5), resume=True)
    short = {"ppo__lr_schedule": "constant", "train__eval_every": 0}
    trainer.train(config(tiny_model, tmp_path / "r", train__steps=1, **short))
    trainer.train(config(tiny_model, tmp_path / "r", train__steps=2, **short), resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [0, 1, 2]


def test_a_setting_that_is_no_more_is_named(tiny_model: Path, whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    shutil.copytree(whole_run, run_dir)
    state = checkpoint.list_checkpoints(run_dir)[-1] / "state.json"
    saved = json.loads(state.read_text())
    saved["config"] |= {"run_dir": str(run_dir), "ppo": {**saved["config"]["ppo"], "gone": 1}}
    state.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"ppo\.gone = None, but the run .* has 1"):
        trainer.train(config(tiny_model, run_dir), resume=True)


def test_too_little_memory_is_not_a_damaged_checkpoint(
    tiny_model: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoint.optimizers, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train(config(tiny_model, whole_run), resume=True)


def test_divergence_leaves_a_report_and_no_policy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.PPO.prepare

    def poisoned(self: Any, batch: Any) -> Any:
        train, metrics = original(self, batch)
        if self.step == 1:
            train.advantages[0] = torch.inf
        return train, metrics

    monkeypatch.setattr(trainer.PPO, "prepare", poisoned)
    with pytest.raises(TrainingDiverged, match="step 2"):
        trainer.train(config(tiny_model, tmp_path / "r"))
    report = json.loads((tmp_path / "r" / "diverged_step_000002.json").read_text())
    assert report["parameters_with_bad_gradients"]
    assert not (tmp_path / "r" / "policy").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__max_prompt_tokens": 400, "ppo__microbatch_tokens": 64}, "microbatch_tokens = 64"),
        ({"rollout__max_new_tokens": 250}, "positions"),
        ({"data__train": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"reward": {"source": "nowhere:f"}}, "nowhere"),
        ({"reward": {"source": "lexicall"}}, "lexicall"),
        ({"ppo__loss": "nowhere:f"}, r"ppo\.loss"),
        (
            {"ppo__loss": "os:getcwd"},
            r"ppo\.loss = 'os:getcwd' takes \(\) and is called with \(evaluation, batch, config,",
        ),
        ({"ppo__loss": "test_trainer:not_a_loss"}, "must return a LossOutput"),
        (
            {"rollout__engine": "os:getcwd"},
            r"'os:getcwd' takes \(\) and is called with \(config, tokenizer, device\): too",
        ),
        ({"reward": {"source": "os:getcwd"}}, r"'os:getcwd' takes \(\) and is called with \(rollouts\): too many"),
        ({"reward": {"source": "operator:neg"}}, r"reward 'operator:neg' failed with TypeError \(bad operand[^)]*\)$"),
        ({"model__path": "/no/where"}, r"model\.path = '/no/where': there is no such folder"),
        ({"device": "cuda"}, "CUDA"),
        ({"model__path": ""}, r"model\.path"),
        ({"reward": {"source": "test_trainer:broken_reward"}}, "broken_reward"),
    ],
)
def test_bad_input_is_one_sentence(tiny_model: Path, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match=expected) as caught:
        trainer.train(config(tiny_model, tmp_path / "r", **changes))
    assert "\n" not in str(caught.value)


def test_data_order_is_a_shuffle_of_every_epoch(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer.setup(config(tiny_model, tmp_path / "r"))
    count = len(run.prompts)
    order = [p for step in range(count) for p in trainer.batch_of_prompts(run.config, run.prompts, step)]
    assert len(order) == 4 * count
    for epoch in range(4):
        assert sorted(map(repr, order[epoch * count : (epoch + 1) * count])) == sorted(map(repr, run.prompts))
    assert order[:count] != order[count : 2 * count]
    assert len(set(map(id, order))) == len(order)  # a prompt that comes twice in a step shares nothing with itself
    assert not {p.user_id for p in run.prompts} & {p.user_id for p in run.eval_prompts}


# ---------------------------------------------------------------- the parity gate, and rollouts one step ahead


def test_one_step_ahead_is_bounded_reproducible_and_resumes_bit_for_bit(
    tiny_model: Path, whole_run: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        trainer.train(config(tiny_model, tmp_path / name, rollout__staleness=1))
    assert trajectory(tmp_path / "a") == trajectory(tmp_path / "b")
    rows = [row for row in read_metrics(tmp_path / "a") if row["step"] > 0]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert trajectory(tmp_path / "a")[0] == pytest.approx(trajectory(whole_run)[0], rel=1e-4)  # fresh, weights are 1
    assert trajectory(tmp_path / "a")[2:] != trajectory(whole_run)[2:]
    assert all(row["time/rollout"] > 1e-3 for row in rows)  # what sampling took, not what the step waited for it
    assert all(row["perf/rollout_tokens_per_second"] < 1e5 for row in rows)
    trainer.train(config(tiny_model, tmp_path / "c", rollout__staleness=1))
    shutil.rmtree(checkpoint.list_checkpoints(tmp_path / "c")[-1])
    shutil.rmtree(tmp_path / "c" / "policy")
    trainer.train(config(tiny_model, tmp_path / "c", rollout__staleness=1), resume=True)
    assert trajectory(tmp_path / "c") == trajectory(tmp_path / "a")


def test_recomputing_activations_beside_rollouts_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """The generator that rollouts draw from at the same time is left alone."""
    for name, recompute in (("plain", False), ("a", True), ("b", True)):
        made = config(tiny_model, tmp_path / name, rollout__staleness=1)
        trainer.train(
            made.model_copy(update={"model": made.model.model_copy(update={"gradient_checkpointing": recompute})})
        )
    assert trajectory(tmp_path / "a") == trajectory(tmp_path / "b")
    assert trajectory(tmp_path / "a") == trajectory(tmp_path / "plain")


def test_stale_rollouts_are_weighted_and_fresh_ones_where_a_cap_is_given(tiny_model: Path, tmp_path: Path) -> None:
    for staleness, cap, expected in (
        (0, None, [1.0, 1.0, 1.0]),
        (0, 1.5, [1.0, 0.5, 1.5]),
        (1, 1.5, [1.0, 0.5, 1.5]),
        (1, None, [1.0, 0.5, 2.0]),
    ):
        run = trainer.setup(config(tiny_model, tmp_path / "r", rollout__staleness=staleness, ppo__importance_cap=cap))
        behaviour = torch.tensor([-1.0, -1.0, -1.0])
        old = behaviour + torch.tensor([1.0, 0.5, 4.0]).log()
        weights = run.ppo._importance_weights(old, behaviour)
        torch.testing.assert_close(weights, torch.tensor(expected))
        run.source.close()


def test_a_skipped_publish_stops_the_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's gate alone: this engine does not verify what it was sent."""
    original = HFEngine.load_weights

    def lazy(self: HFEngine, weights: Any, version: int) -> None:
        original(self, weights, version) if version < 3 else setattr(self, "_version", version)

    monkeypatch.setattr(HFEngine, "load_weights", lazy)
    with pytest.raises(EngineError, match="parity/"):
        trainer.train(config(tiny_model, tmp_path / "r"))
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [0, 1, 2, 3]
