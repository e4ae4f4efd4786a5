"""The benchmarks run: tiny shapes, on the CPU, so that the GPU entry never rots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tppo_fast.data_types import Rollout

bench_rollout = pytest.importorskip("benchmarks.bench_rollout")
bench_learning = pytest.importorskip("benchmarks.bench_learning")
learning_from_feedback = pytest.importorskip("benchmarks.learning_from_feedback")
from benchmarks.op_cases import blocked_gae, padded_gae  # noqa: E402
from benchmarks.results import Options  # noqa: E402

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where torch.compile does not compile: that takes minutes and is not ours to test."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_the_gpu_check_runs_dry(tmp_path: Path) -> None:
    done = run("benchmarks.gpu_check", "--dry", "--rounds", "1", "--out", str(tmp_path / "ops.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the gate is green" in done.stdout + done.stderr
    report = json.loads((tmp_path / "ops.json").read_text())
    assert len(report["results"]) > 20
    assert not [r for r in report["results"] if r["provider"].startswith("tppo") and r["problem"]]
    rows = json.loads((tmp_path / "step.json").read_text())["results"]
    assert {r["provider"] for r in rows} >= {"tppo_fast: shared body", "tppo_fast: own critic", "TRL PPO"}
    for row in rows:
        assert not row["problem"] or row["provider"] == "TRL PPO"
        assert row["problem"] or row["unit"] == "tokens/s" or (row["share_of_ceiling"] and row["device_peak_bytes"])


def test_the_ops_suite_runs_quick(tmp_path: Path) -> None:
    """Every provider but the slow compilers agrees on every op it has, or says why it cannot run."""
    names = "tppo_fast,torch eager,padded PyTorch,F.linear_cross_entropy,TRL,verl,Liger,QuACK"
    done = run(
        "benchmarks", "--suite", "ops", "--quick", "--rounds", "1", "--threads", "1", "--providers", names, "--out", str(tmp_path)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("*/ops.json")
    rows = json.loads(path.read_text())["results"]
    assert not [r for r in rows if "disagrees" in (r["problem"] or "")]
    measured = {r["provider"].split(":")[0] for r in rows if r["median"]}
    assert {"tppo_fast", "torch eager", "F.linear_cross_entropy", "TRL", "verl", "Liger"} <= measured
    assert [r["problem"] for r in rows if r["provider"] == "QuACK"] == ["its kernel needs a GPU"]


@pytest.mark.parametrize("length", [1, 2, 15, 64, 65, 200, 4097])
def test_blocked_gae_is_the_loops(length: int) -> None:
    """In fp64, at lengths that fill their blocks and that do not."""
    rewards, values = torch.randn(2, 3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        blocked_gae(rewards, values, 0.99, 0.95), padded_gae(rewards, values, 0.99, 0.95), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_rollout_suite_runs_quick(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our engine and TRL's own sampling on the same weights: both report the trainer's log-probabilities."""
    monkeypatch.setattr(bench_rollout, "ENGINES", {"tppo_fast: transformers": "hf"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bench_rollout.run(Options(quick=True, model=tiny_model, threads=1)).results
    assert [r.problem for r in found] == [None, None]
    assert [r.provider for r in found] == ["tppo_fast: transformers", "TRL"]


def test_an_engine_of_other_weights_is_not_timed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = bench_rollout.TRLGenerate.generate

    def off(self: object, *given: object) -> list[Rollout]:
        return [replace(r, logprobs=[x - 0.1 for x in r.logprobs]) for r in generate(self, *given)]

    monkeypatch.setattr(bench_rollout, "ENGINES", {"tppo_fast: transformers": "hf"})
    monkeypatch.setattr(bench_rollout.TRLGenerate, "generate", off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bench_rollout.run(Options(quick=True, model=tiny_model, threads=1)).results
    assert "it disagrees: parity/mean is 0.1 nats" in found[1].problem
    assert not found[1].values


def test_learning_rows_are_samples_and_seconds_of_every_seed() -> None:
    bench_learning.experiment(Options(quick=True)), bench_learning.experiment(Options())  # valid settings
    curves = [[[0, 0.0, 0.39], [640, 3.0, 0.43]], [[0, 0.0, 0.39], [640, 3.5, 0.44]]]
    rows = bench_learning._rows("TPPO", curves, 0.39)
    assert [(r.unit, r.values, r.problem) for r in rows] == [
        ("responses", [640, 640], None), ("s", [3.0, 3.5], None), ("relevance", [0.43, 0.44], None),
    ]  # fmt: skip
    missed = bench_learning._rows("GRPO", [curves[0], [[0, 0.0, 0.39], [640, 3.5, 0.42]]], 0.39)
    assert [(r.values, r.problem) for r in missed[:2]] == [([], "1 of 2 seeds never reached it")] * 2


def test_learning_from_feedback_runs_and_refuses_stages_of_other_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--out",
        str(tmp_path / "run"),
        "--labels",
        "next",
        "--backbone",
        "encoder",
        "--rm-test",
        "0.3",
        "--copies",
    ]
    small = [
        "--sft-steps",
        "2",
        "--steps",
        "2",
        "--sessions",
        "30",
        "--samples",
        "1",
        "--seeds",
        "1",
        "--eval-sessions",
        "6",
    ]
    batch = ["--prompts-per-step", "2", "--samples-per-prompt", "2", "--reject-copies"]
    done = run("benchmarks.learning_from_feedback", *words, *small, *batch)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["independent"] == ["relevance"]
    assert len(result["differences"]["hit"]["trained"]) == 1
    monkeypatch.setattr(sys, "argv", ["learning_from_feedback", *words, *small, *batch, "--kl-coef", "0.1"])
    with pytest.raises(SystemExit, match=r"--kl-coef = 0\.1, but"):
        learning_from_feedback.main()
