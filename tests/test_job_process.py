"""Jobs side by side: the same policies as one after the other, a failure costs only itself, stopped together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_compare import values

from tppo_fast import compare, job_process
from tppo_fast.errors import JobsFailed
from tppo_fast.experiment_config import Experiment
from tppo_fast.run_dir import list_checkpoints
from tppo_fast.sections import build_section


def test_the_same_policies_and_a_failure_apart(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def experiment(name: str, at_once: int) -> Experiment:
        given = values(tiny_model, tmp_path / name)
        reward = {"reward": {"source": "json:loads"}}
        given["methods"] = [*given["methods"][:1], {"name": "broken", "algorithm": "tppo", "settings": reward}]
        return build_section({**given, "at_once": at_once, "seeds": [1]}, Experiment)

    for name, at_once in (("one", 1), ("two", 2)):
        with pytest.raises(JobsFailed, match="1 of 2 jobs failed"):
            compare.compare(experiment(name, at_once))
    err = capfd.readouterr().err
    assert "TPPO, seed 1: done in" in err
    record = json.loads((tmp_path / "two" / "evaluation.json").read_text())["record"]
    assert all("json:loads" in reason for reason in record["failures"].values())
    one, two = (load_file(tmp_path / d / "tppo" / "seed-1" / "policy" / "model.safetensors") for d in ("one", "two"))
    assert all(one[name].equal(two[name]) for name in one)


def test_stopped_together_they_go_on_together(tiny_model: Path, tmp_path: Path) -> None:
    given = values(tiny_model, tmp_path / "e")
    given["base"]["train"] |= {"steps": 400, "eval_every": 0}
    given |= {"methods": given["methods"][:1], "at_once": 2}
    (tmp_path / "e.json").write_text(json.dumps(given))
    code = (
        "import json, sys; from tppo_fast.cli import run; from tppo_fast.compare import compare\n"
        "from tppo_fast.experiment_config import Experiment; from tppo_fast.sections import build_section\n"
        "sys.exit(run(lambda: compare(build_section(json.load(open(sys.argv[1])), Experiment))))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "e.json")]
    folders = [tmp_path / "e" / "tppo" / f"seed-{seed}" for seed in (0, 1)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not all(
            (f / "metrics.jsonl").exists() and len((f / "metrics.jsonl").read_text().split("\n")) > 3 for f in folders
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped with 2 jobs under way, which save a checkpoint; continue with the same command" in err
    for folder in folders:
        assert list_checkpoints(folder)
        assert "continue with --resume" in (folder / job_process.LOG).read_text()


def test_each_job_has_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tppo_fast import jobs

    plain = {**values(tmp_path, tmp_path), "methods": [{"name": "TPPO", "algorithm": "tppo"}]}
    job = jobs.plan(build_section(plain, Experiment), tmp_path, {})[0]
    free = jobs.plan(build_section({**plain, "base": {}}, Experiment), tmp_path, {})[0]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(job_process.torch.cuda, "device_count", lambda: 0)
    assert job_process._share(job, 0, 3) == {}  # threads are set
    assert job_process._share(free, 0, 3) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(job_process.torch.cuda, "device_count", lambda: 2)
    assert [job_process._share(job, place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["2", "5", "2"]
