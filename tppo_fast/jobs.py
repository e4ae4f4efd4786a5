"""The jobs of an experiment: a run folder for each (method, seed), continued where it stopped; a failure costs only itself."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from tppo_fast import dpo, preflight, trainer
from tppo_fast.atomic import write_atomic
from tppo_fast.config import Config, RunConfig
from tppo_fast.errors import UserError
from tppo_fast.experiment_config import Experiment, Method
from tppo_fast.finetune_config import DPOConfig
from tppo_fast.progress import say
from tppo_fast.run_dir import FREE, list_checkpoints
from tppo_fast.sections import Section, build_section, first_change, read_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One method with one seed."""

    method: Method
    seed: int
    config: RunConfig

    @property
    def policy(self) -> Path:
        return self.config.run_dir / "policy"

    @property
    def finished(self) -> bool:
        return self.policy.is_dir()

    @property
    def samples_per_step(self) -> int:
        """Sampled responses that one step trains on (the other side of a DPO pair is the user's own)."""
        if isinstance(self.config, DPOConfig):
            return self.config.dpo.batch_size
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt


def plan(experiment: Experiment, start: Path, data: Mapping[str, str]) -> list[Job]:
    """Every job, seed by seed, so that an early look compares whole sets of methods.

    Raises:
        UserError: a method's settings are not valid, or a job of that name ran with others.
    """
    jobs = []
    for seed in experiment.seeds:
        for method in experiment.methods:
            section: type[RunConfig] = DPOConfig if method.algorithm == "dpo" else Config
            values = merged(pick(experiment.base, section), method.settings)
            own = {
                "run_dir": str(experiment.run_dir / slug(method.name) / f"seed-{seed}"), "seed": seed,
                "model": {"path": str(start)}, "data": dict(data),
            }  # fmt: skip
            if section is Config:
                own["algorithm"] = method.algorithm
            try:
                config = build_section(merged(values, own), section)
                preflight.check_plug_ins(config)
            except UserError as error:
                raise UserError(f"method {method.name!r}: {error}") from None
            jobs.append(Job(method=method, seed=seed, config=config))
    folders = [job.config.run_dir for job in jobs]
    if len(set(folders)) < len(folders):
        raise UserError(
            "two methods have names that differ in punctuation alone: their folders would be one, rename one"
        )
    for job in jobs:
        check_record(_record(job), job.config, f"method {job.method.name!r}")
    return jobs


def run(jobs: list[Job]) -> dict[str, str]:
    """Run what is not finished; returns why each failed job failed, by its folder. An interruption ends all.

    A failed job is tried again the next time.
    """
    failures: dict[str, str] = {}
    for number, job in enumerate(jobs, 1):
        if job.finished:
            continue
        say(f"[bold]{number}/{len(jobs)} {escape(job.method.name)}[/], seed {job.seed}")
        began = time.monotonic()
        prepare(job)
        try:
            train(job.config)
        except (UserError, RuntimeError, MemoryError, OSError) as error:
            failures[str(job.config.run_dir)] = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"failed after {time.monotonic() - began:.0f} s: {error}", markup=False)
    return failures


def prepare(job: Job) -> None:
    """Make a job's folder, with its record."""
    job.config.run_dir.mkdir(parents=True, exist_ok=True)
    keep_record(_record(job), job.config)


def train(config: RunConfig) -> None:
    """One job, from its newest checkpoint if it has one."""
    run: Callable[..., Any] = dpo.dpo if isinstance(config, DPOConfig) else trainer.train
    run(config, resume=bool(list_checkpoints(config.run_dir)))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, ``over`` winning."""
    out = dict(base)
    for name, value in over.items():
        below = out.get(name)
        out[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def pick(values: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """The settings that ``section`` has; the shared base also holds those of other kinds of run."""
    return {name: value for name, value in values.items() if name in section.model_fields}


def slug(name: str) -> str:
    """A folder name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "method"


def _record(job: Job) -> Path:
    return job.config.run_dir / "job.json"


def keep_record(path: Path, config: Section) -> None:
    """Write what a run's settings are, for ``check_record``."""
    write_atomic(path, json.dumps(config.model_dump(mode="json"), indent=1).encode())


def check_record(path: Path, config: Section, who: str) -> None:
    """Refuse to take a finished run for one with other settings, but for those that change no result.

    Raises:
        UserError: naming the setting that differs from the record, if there is one; or the record is damaged.
    """
    if not path.exists():
        return
    free = FREE - {"run_dir", "train"}
    if changed := first_change(read_settings(path), config.model_dump(mode="json"), free):
        name, was, is_now = changed
        raise UserError(f"{who}: {name} = {is_now!r}, but {str(path)!r} ran with {was!r}; use another name or run_dir")
