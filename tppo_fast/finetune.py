"""The loop of supervised runs (SFT, DPO): step, look at held-out sessions, keep the best, stop and resume exactly."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tppo_fast import checkpoint, model, optimizers, seeding
from tppo_fast.atomic import atomic_folder
from tppo_fast.compiling import compile_layers
from tppo_fast.config import RunConfig
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data_types import Prompt
from tppo_fast.errors import TrainingDiverged
from tppo_fast.evaluate import held_out
from tppo_fast.finetune_config import LearnConfig
from tppo_fast.interrupt import InterruptGuard
from tppo_fast.metrics import MetricsLogger
from tppo_fast.model import Actor
from tppo_fast.progress import Progress
from tppo_fast.rollout import RolloutEngine
from tppo_fast.runs import due, eval_sampling, growing_segments, logged, resolve_device, warn_of_other_prompts

Metrics = dict[str, float]


class Objective(Protocol):
    """What is minimised. Its gradient is a function of the weights and the step alone."""

    def gradient(self, step: int) -> Metrics:
        """Add the gradient of one step's batch to the parameters; returns the step's metrics, ``fit/loss`` among them."""
        ...

    def evaluate(self) -> Metrics:
        """Metrics on held-out examples without gradient, ``eval/loss`` among them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """What a finished run leaves behind."""

    run_dir: Path
    """Metrics, checkpoints and the final policy."""
    policy: Path
    """The policy: a folder plain transformers loads, adapters merged."""
    step: int
    """The step the policy is from."""
    evaluation: Metrics
    """The held-out evaluation of that policy."""


@dataclass(slots=True, kw_only=True)
class Best:
    """The evaluation with the lowest held-out loss so far."""

    step: int = -1
    """Its step; -1 before the first."""
    evaluation: Metrics = field(default_factory=dict)
    """Its metrics."""

    @property
    def loss(self) -> float:
        return self.evaluation.get("eval/loss", math.inf)


class Learner:
    """The policy, its optimizer and its schedule: all that a checkpoint holds. ``step`` counts finished steps."""

    def __init__(self, actor: Actor, learn: LearnConfig, steps: int, setting: str = "sft.lr") -> None:
        self.actor, self.step, self.best = actor, 0, Best()
        self._clip, self._setting = learn.max_grad_norm, setting
        self.parameters = {name: p for name, p in actor.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=learn.lr,
            betas=(learn.adam_beta1, learn.adam_beta2),
            weight_decay=learn.weight_decay,
        )
        self.scheduler = optimizers.schedule(self.optimizer, learn.lr_schedule, learn.lr_warmup_steps, steps)

    def take(self, gradient: Callable[[int], Metrics]) -> Metrics:
        """One optimizer step on what ``gradient`` leaves in the parameters.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; the weights are left as they were.
        """
        self.optimizer.zero_grad(set_to_none=True)
        metrics = gradient(self.step)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self._clip))
        if not (math.isfinite(norm) and math.isfinite(metrics["fit/loss"])):
            self.optimizer.zero_grad(set_to_none=True)
            report = {"step": self.step + 1, "loss": metrics["fit/loss"], "grad_norm": norm}
            raise TrainingDiverged(report, self._setting)
        metrics |= {"fit/grad_norm": norm, "fit/lr": self.optimizer.param_groups[0]["lr"]}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return metrics

    def save(self, config: RunConfig) -> Path:
        """Write a checkpoint, see ``checkpoint.write``."""

        def fill(folder: Path) -> dict[str, Any]:
            save_file(checkpoint.contiguous(dict(self.parameters)), folder / "learned.safetensors")
            best = {"step": self.best.step, "evaluation": self.best.evaluation}
            return {"step": self.step, "best": best, "scheduler": self.scheduler.state_dict()}

        keep = config.train.keep_checkpoints
        written = checkpoint.write(config.run_dir, self.step, fill, self.optimizer, config, keep=keep)
        checkpoint.drop_best(config.run_dir, self.best.step)
        return written

    def keep_if_best(self, run_dir: Path, evaluation: Metrics, builder: PromptBuilder) -> None:
        """Keep the policy in ``run_dir`` if its held-out loss is the lowest so far.

        Raises:
            TrainingDiverged: the loss is not finite.
        """
        if not math.isfinite(evaluation["eval/loss"]):
            raise TrainingDiverged({"step": self.step, **evaluation}, self._setting)
        if evaluation["eval/loss"] < self.best.loss:
            with atomic_folder(checkpoint.best_of(run_dir, self.step)) as temporary:
                self.actor.save(temporary, builder)
            self.best = Best(step=self.step, evaluation=evaluation)
            checkpoint.drop_best(run_dir, self.step)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Put a checkpoint in place.

        Raises:
            UserError: it is damaged or belongs to another model.
        """
        with checkpoint.reading(folder, self.optimizer) as state:
            saved = load_file(folder / "learned.safetensors")
            if saved.keys() != self.parameters.keys():
                raise ValueError("it holds other parameters than the model")
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
            self.scheduler.load_state_dict(state["scheduler"])
            self.step, self.best = state["step"], Best(**state["best"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Who answers the held-out sessions of a supervised run."""

    engine: RolloutEngine
    """Samples from a copy of the policy."""
    prompts: Sequence[Prompt]
    """The held-out sessions."""
    builder: PromptBuilder
    """Parses the responses."""

    def evaluate(self, config: RunConfig, actor: Actor, version: int) -> Metrics:
        """Metrics of one response to each held-out session."""
        self.engine.load_weights(actor.named_weights(), version=version)
        rollouts = self.engine.generate(self.prompts, eval_sampling(config))
        if config.vllm.sleep != "off":
            self.engine.sleep()
        return held_out(rollouts, self.builder.parse, num_queries=config.data.num_queries, seed=config.seed)


def build(config: RunConfig) -> tuple[Actor, Any, PromptBuilder]:
    """The policy (no critic) on its device, its tokenizer, and the prompts' builder."""
    if config.threads:
        torch.set_num_threads(config.threads)
    growing_segments(config)
    seeding.seed_everything(config.seed)
    warn_of_other_prompts(config.model.path, config.data)
    actor_critic, tokenizer = model.build(config.model, resolve_device(config.device), critic=False)
    if config.model.compile:
        compile_layers([actor_critic.actor])
    return actor_critic.actor, tokenizer, PromptBuilder(tokenizer, config.data)


def run(
    config: RunConfig,
    learn: LearnConfig,
    learner: Learner,
    objective: Objective,
    held: Held,
    *,
    start_from: Path | None,
    name: str,
) -> FinetuneResult:
    """The loop, from a checkpoint or the start, to ``run_dir/policy``. Who built the engine closes it.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; a report is in ``run_dir`` and earlier checkpoints stay.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint of the last finished step was saved.
    """
    if start_from is not None:
        learner.load(start_from)
    with logged(config, learner.step, lambda: learner.save(config)) as (logger, guard):
        last = _loop(config, learner, objective, held, logger, guard, name)
    policy = config.run_dir / "policy"
    chosen = learner.best if learn.select == "best" else Best(step=learner.step, evaluation=last)
    with atomic_folder(policy) as temporary:
        if learn.select == "best":
            shutil.copytree(checkpoint.best_of(config.run_dir, chosen.step), temporary, dirs_exist_ok=True)
        else:
            learner.actor.save(temporary, held.builder)
    return FinetuneResult(run_dir=config.run_dir, policy=policy, step=chosen.step, evaluation=chosen.evaluation)


def _loop(
    config: RunConfig,
    learner: Learner,
    objective: Objective,
    held: Held,
    logger: MetricsLogger,
    guard: InterruptGuard,
    name: str,
) -> Metrics:
    """Steps and evaluations; returns the last evaluation."""
    train, evaluation = config.train, {}

    def look() -> Metrics:
        began = time.perf_counter()
        found = objective.evaluate() | held.evaluate(config, learner.actor, learner.step)
        found["time/eval"] = time.perf_counter() - began
        learner.keep_if_best(config.run_dir, found, held.builder)
        return found

    if learner.step == 0:
        evaluation = look()
        logger.log(0, evaluation)
    with Progress(name, train.steps, "step", start=learner.step) as progress:
        while learner.step < train.steps:
            guard.check()
            began = time.perf_counter()
            metrics = learner.take(objective.gradient)
            metrics["time/step"] = time.perf_counter() - began
            if due(learner.step, train.eval_every, train.steps):
                evaluation = look()
                metrics |= evaluation
            logger.log(learner.step, metrics)
            if due(learner.step, train.save_every, train.steps):
                learner.save(config)
            shown = {"loss": metrics["fit/loss"]}
            if evaluation:
                shown |= {"held-out": evaluation["eval/loss"], "relevance": evaluation["eval/relevance"]}
            progress.update(1, **shown)
    return evaluation or look()
