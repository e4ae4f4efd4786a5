"""The benchmarks run: tiny shapes, on the CPU, so that the GPU entry never rots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_the_gpu_check_runs_dry(tmp_path: Path) -> None:
    done = run("benchmarks.gpu_check", "--dry", "--rounds", "1", "--out", str(tmp_path / "ops.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the gate is green" in done.stdout + done.stderr
    report = json.loads((tmp_path / "ops.json").read_text())
    assert len(report["results"]) > 20
    assert not [r for r in report["results"] if r["provider"].startswith("tppo") and r["problem"]]


def test_the_step_benchmark_runs_tiny(tiny_model: Path, tmp_path: Path) -> None:
    """Every lever saves what it is for, counted; and all providers compute the same step."""
    out = tmp_path / "step.json"
    done = run("benchmarks.bench_step", "--model", str(tiny_model), "--tiny", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["problems"] == []
    rows = report["providers"]
    assert rows["prompts not shared"]["update_flops_over_lean"] > 3
    assert rows["prompts not shared"]["update_live_bytes_over_lean"] > 3
    assert rows["critic with a body of its own"]["update_flops_over_lean"] > 1.5
    assert rows["head at four units"]["update_flops_over_lean"] > 1
    assert rows["padded baseline"]["update_flops_over_lean"] > 4
