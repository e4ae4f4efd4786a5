"""The training run: publish, act, score, prepare, learn, record; evaluate and save when due; stop and resume exactly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tppo_fast import building, checkpoint, flops, packing, parity, preflight, profiling, seeding
from tppo_fast.ahead import RolloutSource
from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.atomic import atomic_folder, write_atomic
from tppo_fast.clock import Clock
from tppo_fast.config import Config
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.sessions import Session
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import EngineError, TrainingDiverged, UserError
from tppo_fast.evaluate import held_out
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.leader import Leader
from tppo_fast.metrics import MetricsLogger, read_metrics
from tppo_fast.ppo import PPO, Metrics
from tppo_fast.progress import Progress, say
from tppo_fast.rewards import TokenRewards, build_reward
from tppo_fast.rewards.display import examples_table
from tppo_fast.rewards.model_source import ModelReward, warn_of_known_users
from tppo_fast.rewards.token_model import RECORD
from tppo_fast.rewards.watch import RunWatch, canonical_share, repetition_and_copies, rollout_metrics
from tppo_fast.rollout import RolloutEngine, SamplingParams
from tppo_fast.rollout.base import check_lengths
from tppo_fast.run_dir import list_checkpoints, open_run_dir, step_of
from tppo_fast.runs import (
    due,
    eval_sampling,
    growing_segments,
    load_sessions,
    logged,
    resolve_device,
    warn_of_other_prompts,
)
from tppo_fast.sections import Settings, given
from tppo_fast.shares import SharedEngine, SharedScores
from tppo_fast.team import Team

OnStep = Callable[[int, Metrics], bool | None]
"""(step, what was logged of it) -> whether to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished run leaves behind."""

    run_dir: Path
    """Metrics, checkpoints and the final policy."""
    policy: Path
    """The trained policy: a folder plain transformers loads."""
    evaluation: dict[str, float]
    """The last evaluation on held-out sessions."""


@dataclass(slots=True, kw_only=True)
class Run:
    """The parts of a run, built once by ``setup``."""

    config: Config
    tokenizer: Any
    builder: PromptBuilder
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    reward: TokenRewards
    engine: RolloutEngine
    source: RolloutSource
    ppo: PPO


def train(
    config: Config | Settings,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    profile: int = 0,
    memory_snapshot: bool = False,
) -> TrainResult:
    """Train a policy by token-level PPO and leave it, its metrics and its checkpoints in ``config.run_dir``.

    Args:
        config: every setting, see ``tppo_fast.config``; or a nested dict of them, or the path of a TOML file.
        resume: continue the newest checkpoint of ``run_dir``, bit for bit as if it had never stopped. (One that had ended and is
            given more ``train.steps`` goes on from its end; with ``rollout.staleness`` 1 its next batch is a fresh one.)
        on_step: called with (step, metrics) when a step is logged. If it returns True the run ends there as if it were the last
            step, with a checkpoint from which ``resume`` goes on.
        profile: steps, after the first one, of which torch's profiler writes a trace into ``run_dir``.
        memory_snapshot: write torch's snapshot of the GPU's allocator into ``run_dir``.

    Raises:
        UserError: bad settings, data or model, before any expensive work; or a reward, loss or engine that failed later.
        ProcessFailed: one of ``config.processes`` failed.
        EngineError: the engine was lost or samples from another policy. After this and whatever else failed later (what
            ``on_step`` raised, too), a checkpoint of the last finished step was saved, unless the next update had begun.
        TrainingDiverged: a loss or gradient is not finite; a report is in ``run_dir`` and earlier checkpoints stay.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint of the last finished step was saved.
    """
    config = given(config, Config)
    if not isinstance(resume, bool):
        raise UserError(
            f"resume = {resume!r}: give True, to continue the newest checkpoint in config.run_dir, or False"
        )
    if not (on_step is None or callable(on_step)):
        raise UserError(f"on_step = {on_step!r}: give a function of (step, metrics), or None")
    if isinstance(profile, bool) or not isinstance(profile, int) or profile < 0:
        raise UserError(f"profile = {profile!r}: give a number of steps, or 0 for no trace")
    preflight.check(config, resume)
    growing_segments(config)
    with (
        seeding.restored(),
        open_run_dir(config, resume) as start_from,
        profiling.memory_snapshot(config.run_dir, resolve_device(config.device), memory_snapshot),
    ):
        return _train(config, start_from, on_step, profile)


def _train(config: Config, start_from: Path | None, on_step: OnStep | None, profile: int) -> TrainResult:
    if config.processes > 1 and not config.threads:
        config = config.model_copy(update={"threads": max(1, torch.get_num_threads() // config.processes)})
    with contextlib.ExitStack() as open_parts:
        team = None
        if config.processes > 1:
            team = open_parts.enter_context(Leader(config, start_from, resolve_device(config.device)))
        run = setup(config, start_from, team)
        open_parts.enter_context(contextlib.closing(run.engine))
        open_parts.enter_context(contextlib.closing(run.source))
        if team is not None:  # or what ends the run would wait for what they sample
            open_parts.push(lambda failed, *_: team.end() if failed else None)
        if config.reward.source == "model":
            write_atomic(config.run_dir / "reward_model.json", (Path(config.reward.model) / RECORD).read_bytes())
        evaluation = _logged(run, on_step, profile)
    policy = config.run_dir / "policy"
    with atomic_folder(policy) as temporary:
        run.ppo.model.actor.save(temporary, run.builder)
    return TrainResult(run_dir=config.run_dir, policy=policy, evaluation=evaluation)


def _logged(run: Run, on_step: OnStep | None, profile: int) -> Metrics:
    """The PPO loop with its log."""
    start, run_dir = run.ppo.step, run.config.run_dir
    with (
        logged(run.config, start, lambda: _save(run)) as (logger, guard),
        profiling.StepTrace(run_dir, profile) as trace,
    ):
        try:
            return _loop(run, logger, guard, trace, on_step, evaluate_first=start == 0)
        except TrainingDiverged:
            raise
        except Exception as error:
            saved = None
            with contextlib.suppress(Exception):  # what ended the run is what is said of it
                saved = _saved_in_time(run)
            if saved:
                said = f"step {run.ppo.step} is saved in {saved}: continue with --resume (resume=True)"
                if isinstance(error, (UserError, EngineError)):
                    error.args = (f"{error}; {said}",)
                else:
                    error.add_note(said)
            raise


def _saved_in_time(run: Run) -> Path | None:
    """The checkpoint of the last finished step, made now where there is none; None where no step can be gone on from."""
    ppo = run.ppo
    if not ppo.step or ppo.updating or not all(bool(p.isfinite().all()) for p in ppo.model.parameters()):
        return None
    newest = list_checkpoints(run.config.run_dir)[-1:]
    return newest[0] if newest and step_of(newest[0]) == ppo.step else _save(run)


def _save(run: Run) -> Path:
    return checkpoint.save(run.config.run_dir, run.ppo, run.builder, run.config, run.source.state(run.ppo.step))


def _loop(
    run: Run,
    logger: MetricsLogger,
    guard: InterruptGuard,
    trace: profiling.StepTrace,
    on_step: OnStep | None,
    *,
    evaluate_first: bool,
) -> Metrics:
    """The PPO loop."""
    config, ppo, steps, stop = run.config, run.ppo, run.config.train.steps, False
    evaluation: Metrics = {}
    watch = RunWatch(read_metrics(config.run_dir))
    peak_rate = flops.peak_rate(ppo.device, getattr(torch, config.model.dtype)) * config.processes
    if evaluate_first:
        evaluation = evaluate(run)
        logger.log(0, evaluation)
        watch(evaluation)
    with Progress("train", steps, "step", start=ppo.step) as progress:
        while ppo.step < steps and not stop:
            guard.check()
            before = seeding.global_state()
            try:
                metrics = _step(run, guard, peak_rate, progress)
            except (Interrupted, Exception):
                # The step will be taken again, and a user's reward may have drawn numbers.
                seeding.set_global_state(before)
                raise
            try:
                if due(ppo.step, config.train.eval_every, steps):
                    progress.phase("evaluate")
                    evaluation = evaluate(run)
                    metrics |= evaluation
            finally:
                logger.log(ppo.step, metrics)
            for warning in watch(metrics):
                say(f"[yellow]step {ppo.step}: {warning}[/]")
            stop = on_step is not None and bool(on_step(ppo.step, dict(metrics)))
            if stop or due(ppo.step, config.train.save_every, steps):
                _save(run)
            shown = {"reward_per_token": metrics["rollout/reward_per_token"]}
            if "ppo/kl" in metrics:
                shown["kl"] = metrics["ppo/kl"]
            if evaluation:
                shown["relevance"] = evaluation["eval/relevance"]
            progress.update(1, **shown)
            trace.step()
    return evaluation or evaluate(run)


def _step(run: Run, guard: InterruptGuard, peak_rate: float, progress: Progress) -> Metrics:
    """One step of the loop, from rollouts to an updated policy."""
    config, ppo, step, clock = run.config, run.ppo, run.ppo.step, Clock(progress.phase)
    if config.ppo.offload or config.vllm.sleep != "off":
        with clock("offload"):
            _make_room(run)
    rollouts = run.source.take(step, clock)
    if config.vllm.sleep != "off":
        with clock("sync"):
            run.engine.sleep()
    if config.ppo.offload:
        with clock("offload"), ppo.team.doing("unpark"):
            ppo.unpark()
    guard.check()
    with clock("score"):
        rewards, classes = run.reward.explain(rollouts)
        batch = packing.pack(rollouts, rewards, share_prompts=config.model.share_prompts)
    guard.check()
    with clock("prepare"):
        with ppo.team.doing("prepare", batch):
            train_batch, prepared = ppo.prepare(batch)
        parity.check(prepared, config)
    guard.check()
    with clock("update"), ppo.team.doing("update"):
        learned = ppo.update(train_batch, lambda part: progress.phase("update", part))

    metrics = {**rollout_metrics(rollouts, rewards, classes), **prepared, **learned}
    metrics |= clock.metrics(batch.num_actions, metrics, peak_rate)
    metrics |= repetition_and_copies(rollouts, config.data.separator) | canonical_share(rollouts, run.tokenizer)
    metrics["rollout/staleness"] = step - rollouts[0].policy_version
    if step == 0 and config.train.show_examples:
        show_examples(run, rollouts, rewards, classes)
    return metrics


# -------------------------------------------------------------------- parts


def setup(config: Config, start_from: Path | None = None, team: Team | None = None) -> Run:
    """Build every part of a run, as the checkpoint ``start_from`` left it; bad input fails here, before any expensive work.

    ``team``: the processes that share it, none without.
    """
    device = building.settle(config)
    if config.ppo.offload and device.type != "cuda":
        raise UserError(f"ppo.offload = true moves memory off a GPU, and device is {device.type!r}: set it to false")
    train_sessions, eval_sessions = load_sessions(config)
    warn_of_known_users(config.reward, [session.user_id for session in eval_sessions])
    warn_of_other_prompts(config.model.path, config.data)
    actor_critic, tokenizer = building.models(config, device)
    builder = PromptBuilder(tokenizer, config.data)
    reward = _reward(config, tokenizer, builder, train_sessions, device)
    prompts = builder.prompts(train_sessions)
    eval_prompts = builder.prompts(eval_sessions[: config.train.eval_prompts])
    longest = max(len(p.token_ids) for p in [*prompts, *eval_prompts]) + config.rollout.max_new_tokens
    check_lengths(longest, actor_critic.actor.lm.config, ("ppo.microbatch_tokens", config.ppo.microbatch_tokens))
    ppo, engine, pending = building.learner_and_engine(config, actor_critic, tokenizer, start_from, team)
    if isinstance(team, Leader):
        try:
            team.meet(ppo)
        except BaseException:
            engine.close()
            raise
        engine = SharedEngine(engine, team)
        if isinstance(reward.source, ModelReward):
            reward = replace(reward, source=SharedScores(reward.source, team))
    source = RolloutSource(
        engine,
        actor_critic.actor.named_weights,
        lambda step: (batch_of_prompts(config, prompts, step), sampling(config, step)),
        staleness=config.rollout.staleness,
        last_step=config.train.steps,
    )
    source.load_state(pending)
    return Run(
        config=config,
        tokenizer=tokenizer,
        builder=builder,
        prompts=prompts,
        eval_prompts=eval_prompts,
        reward=reward,
        engine=engine,
        source=source,
        ppo=ppo,
    )


def _reward(
    config: Config, tokenizer: Any, builder: PromptBuilder, sessions: Sequence[Session], device: torch.device
) -> TokenRewards:
    """Who scores; the length that the length penalty expects is the ``sessions``'."""
    expected = config.reward.expected_length
    if expected is None and config.reward.length_penalty is not False:
        expected = builder.expected_length(sessions)
    return build_reward(
        ALGORITHMS[config.algorithm].reward_config(config.reward),
        tokenizer,
        expected_length=expected or 0.0,
        separator=config.data.separator,
        num_queries=config.data.num_queries,
        device=device,
    )


# -------------------------------------------------------------------- pieces of a step


def batch_of_prompts(config: Config, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
    """The step's prompts: shuffled passes over the data, a function of (seed, step) alone."""
    size = config.rollout.prompts_per_step
    # Each a prompt of its own, though it may come twice: that is what responses and processes are told apart by.
    return [replace(prompts[i]) for i in seeding.batch(config.seed, "data", step, size=size, count=len(prompts))]


def sampling(config: Config, step: int) -> SamplingParams:
    """How to sample in one step."""
    return SamplingParams(
        n=config.rollout.samples_per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        seed=seeding.derive(config.seed, "rollout", step),
    )


def _make_room(run: Run) -> None:
    """Leave the device's memory to the engine, in every process."""
    with run.ppo.team.doing("make_room"):
        building.make_room(run.ppo)


def evaluate(run: Run) -> Metrics:
    """Metrics of one response to each held-out session, with the current policy."""
    began = time.perf_counter()
    run.source.settle()
    _make_room(run)
    run.engine.load_weights(run.ppo.model.actor.named_weights(), version=run.ppo.step)
    rollouts = run.engine.generate(run.eval_prompts, eval_sampling(run.config))
    found = held_out(rollouts, run.builder.parse, num_queries=run.config.data.num_queries, seed=run.config.seed)
    if run.config.reward.held_out:
        with seeding.restored():  # training goes on as if nothing had been drawn
            found["eval/reward_mean"] = float(torch.stack([r.sum() for r in run.reward(rollouts)]).mean())
    return {**found, "time/eval": time.perf_counter() - began}


def show_examples(
    run: Run,
    rollouts: Sequence[Rollout],
    rewards: Sequence[torch.Tensor],
    classes: Sequence[Sequence[int]] | None,
) -> None:
    """Print the first responses with each token's label and reward, so that a person can check the alignment."""
    chosen = list(range(0, len(rollouts), run.config.rollout.samples_per_prompt))[: run.config.train.show_examples]
    labels = None if classes is None else [classes[i] for i in chosen]
    shown, paid, scale = [rollouts[i] for i in chosen], [rewards[i] for i in chosen], run.config.reward.scale
    say(examples_table(shown, labels, paid, run.tokenizer, scale))
