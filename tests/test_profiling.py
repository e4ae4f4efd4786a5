"""The instruments write what they promise, once, and say where they cannot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_trainer import values

from tppo_fast import cli, profiling, trainer
from tppo_fast import config as settings
from tppo_fast.errors import UserError
from tppo_fast.metrics import read_metrics


def test_profile_writes_a_trace_with_the_loops_phases(tiny_model: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    small = values(tiny_model, run_dir)
    small["train"] |= {"steps": 3, "eval_every": 0, "eval_prompts": 2}
    trainer.train(settings.build(small), profile=1)
    assert not list(run_dir.glob("tmp-*"))
    with gzip.open(run_dir / profiling.TRACE) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    for phase in ("rollout_wait", "score", "prepare", "update"):
        assert names.count(f"tppo_fast/{phase}") == 1  # one step was recorded, the first and the last were not
    assert "aten::addmm" in names or "aten::mm" in names
    rows = [row for row in read_metrics(run_dir) if row["step"] > 0]
    for row in rows:
        assert row["perf/padding_waste"] == 0.0
        assert row["perf/update_mfu"] > 0.0
        assert row["perf/update_tokens_per_second"] == pytest.approx(row["perf/update_tokens"] / row["time/update"])


def test_without_it_no_trace_is_written(tmp_path: Path) -> None:
    with profiling.StepTrace(tmp_path, 0) as trace:
        trace.step()
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_early_still_writes_its_trace(tmp_path: Path) -> None:
    def run() -> None:
        with profiling.StepTrace(tmp_path, 5) as trace:
            trace.step()
            torch.ones(3).add(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert (tmp_path / profiling.TRACE).exists()


def test_a_memory_snapshot_needs_a_gpu(tiny_model: Path, tmp_path: Path) -> None:
    run = settings.build(values(tiny_model, tmp_path / "r"))
    with pytest.raises(UserError, match=r"--memory-snapshot.*device 'cpu'.*--profile"):
        trainer.train(run, memory_snapshot=True)
    with profiling.memory_snapshot(tmp_path, torch.device("cpu"), False):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_memory_snapshot_on_a_gpu(tmp_path: Path) -> None:
    with profiling.memory_snapshot(tmp_path, torch.device("cuda"), True):
        torch.ones(1 << 20, device="cuda")
    assert (tmp_path / profiling.SNAPSHOT).stat().st_size > 0


def test_the_command_has_both() -> None:
    text = CliRunner().invoke(cli.cli, ["train", "--help"]).output
    assert "--profile N" in text
    assert "--memory-snapshot" in text
