"""What learns and what samples, built as the settings say: the parts of a run that each of its processes has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tppo_fast import checkpoint, losses, model, optimizers, seeding
from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.compiling import compile_layers
from tppo_fast.config import Config
from tppo_fast.plugins import guarded, load_object
from tppo_fast.ppo import PPO
from tppo_fast.rollout import RolloutEngine, build_engine
from tppo_fast.runs import resolve_device
from tppo_fast.team import Team


def settle(config: Config) -> torch.device:
    """Where this process computes, with its threads and generators set."""
    if config.threads:
        torch.set_num_threads(config.threads)
    seeding.seed_everything(config.seed)
    return resolve_device(config.device)


def models(config: Config, device: torch.device) -> tuple[model.ActorCritic, Any]:
    """Actor, critic where the algorithm has one, and the tokenizer."""
    return model.build(config.model, device, critic=ALGORITHMS[config.algorithm].needs_critic)


def learner(
    config: Config,
    actor_critic: model.ActorCritic,
    loss: losses.LossFunction | None = None,
    team: Team | None = None,
) -> PPO:
    """What learns, and the reference that it stays near; both as the settings store, compile and score them.

    ``loss`` takes the place of ``ppo.loss``.
    """
    if config.ppo.weights == "bfloat16":
        optimizers.store_in_half(m for m in (actor_critic.actor, actor_critic.critic.body) if m is not None)
    reference = None if config.ppo.kl_placement == "off" else actor_critic.actor.frozen_copy()
    if config.model.compile:
        compile_layers([actor_critic.actor, actor_critic.critic.body, reference])
    if loss is None:
        loss = losses.BUILT_IN.get(config.ppo.loss) or guarded(
            load_object(config.ppo.loss, "ppo.loss"), f"ppo.loss = {config.ppo.loss!r}"
        )
    return PPO(config, actor_critic, reference, loss, total_steps=config.train.steps, team=team)


def learner_and_engine(
    config: Config, actor_critic: model.ActorCritic, tokenizer: Any, start_from: Path | None, team: Team | None
) -> tuple[PPO, RolloutEngine, dict[str, Any] | None]:
    """Both, as the checkpoint ``start_from`` left them, and the rollouts that were pending in it."""
    ppo = learner(config, actor_critic, team=team)
    pending = None if start_from is None else checkpoint.load(start_from, ppo)
    state = seeding.global_state()
    if config.ppo.offload:
        ppo.park()  # an engine is never built beside what it will not live with
    engine = build_engine(config, tokenizer, ppo.device)
    seeding.set_global_state(state)
    return ppo, engine, pending


def make_room(ppo: PPO) -> None:
    """Leave the device's memory to the engine, as far as ``ppo.offload`` and ``vllm.sleep`` say."""
    vllm = ppo.config.vllm
    if ppo.config.ppo.offload:
        ppo.park()
    if ppo.device.type == "cuda" and vllm.sleep != "off" and vllm.process != "colocated":
        torch.cuda.empty_cache()  # another process sees what torch keeps for itself as taken
