"""Jobs of an experiment side by side, each in a process of its own: this module, with the job's settings on stdin."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape

from tppo_fast import jobs
from tppo_fast.config import Config
from tppo_fast.finetune_config import DPOConfig
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.progress import Progress, say
from tppo_fast.sections import build_section

LOG = "output.log"
"""In a job's folder: what its process said."""
LOOK_EVERY = 0.2
"""Seconds."""


@dataclass(frozen=True, slots=True)
class _Running:
    job: jobs.Job
    process: subprocess.Popen[bytes]
    began: float


def run_side_by_side(planned: Sequence[jobs.Job], at_once: int) -> dict[str, str]:
    """As ``jobs.run``, with ``at_once`` jobs at a time; several GPUs are shared out, a job to each in turn.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP; every running job has saved a checkpoint.
    """
    waiting = [job for job in planned if not job.finished]
    running: dict[int, _Running] = {}
    failures: dict[str, str] = {}
    total = len(planned)
    with (
        InterruptGuard("when the running jobs have saved") as guard,
        Progress("jobs", total, "job", start=total - len(waiting)) as progress,
    ):
        try:
            while waiting or running:
                guard.check()
                for place in [p for p in range(at_once) if p not in running][: len(waiting)]:
                    running[place] = _start(waiting.pop(0), place, at_once)
                time.sleep(LOOK_EVERY)
                for place in [p for p, r in running.items() if r.process.poll() is not None]:
                    ended = running.pop(place)
                    if reason := _ended(ended):
                        failures[str(ended.job.config.run_dir)] = reason
                    progress.update(1)
        except Interrupted:
            raise Interrupted(
                f"stopped with {len(running)} jobs under way, which save a checkpoint; continue with the same command"
            ) from None
        finally:
            _stop([r.process for r in running.values()])
    return failures


def _start(job: jobs.Job, place: int, at_once: int) -> _Running:
    """Its process, in a session of its own: what a terminal tells ours it hears from us, once."""
    say(f"[bold]{escape(job.method.name)}[/], seed {job.seed}: begun")
    jobs.prepare(job)
    with (job.config.run_dir / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            env={**os.environ, **_share(job, place, at_once)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin is not None
    with process.stdin, contextlib.suppress(BrokenPipeError):  # a process that ends at once says why in its log
        process.stdin.write(job.config.model_dump_json(exclude_unset=True).encode())  # a default is not a choice
    return _Running(job, process, time.monotonic())


def _share(job: jobs.Job, place: int, at_once: int) -> Mapping[str, str]:
    """The variables that leave each job its part of the machine, where nobody has said otherwise."""
    share = {}
    if not job.config.threads and "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    if (count := torch.cuda.device_count()) > 1:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        each = min(getattr(job.config, "processes", 1), count)
        share["CUDA_VISIBLE_DEVICES"] = ",".join(names[(place * each + i) % count] for i in range(each))
    return share


def _ended(ended: _Running) -> str:
    """Why it failed, "" where it did not; said either way."""
    job, code = ended.job, ended.process.returncode
    log, seconds = job.config.run_dir / LOG, time.monotonic() - ended.began
    if code == 0:
        say(f"[bold]{escape(job.method.name)}[/], seed {job.seed}: done in {seconds:.0f} s")
        return ""
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}").strip()
    say(f"{job.method.name}, seed {job.seed}: failed after {seconds:.0f} s: {last} ({log})", markup=False)
    return last


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask each to save and end, and wait for it; whoever does not want to wait ends them at once."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise


def main() -> None:
    """Run one job."""
    from tppo_fast.cli import quiet_libraries, run  # which knows compare, and so this module

    values: dict[str, Any] = json.load(sys.stdin)
    quiet_libraries()
    config = build_section(values, DPOConfig if "dpo" in values else Config)
    sys.exit(run(lambda: jobs.train(config)))


if __name__ == "__main__":
    main()
