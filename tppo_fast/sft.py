"""Supervised fine-tuning on packed sessions: history -> next queries, loss on the response alone. The baseline "GPT4Rec"."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tppo_fast import finetune, packing, preflight, seeding
from tppo_fast.config import RunConfig
from tppo_fast.data.rows import show
from tppo_fast.data_types import Prompt, Rollout, RolloutBatch
from tppo_fast.errors import UserError
from tppo_fast.finetune_config import LearnConfig, SFTConfig
from tppo_fast.model import Actor
from tppo_fast.rollout import build_engine
from tppo_fast.rollout.base import check_lengths
from tppo_fast.run_dir import open_run_dir
from tppo_fast.runs import load_sessions
from tppo_fast.sections import Settings, given

Example = tuple[Prompt, Sequence[int]]
"""(prompt, the tokens of the true response with its end-of-sequence token)."""


def sft(config: SFTConfig | Settings, *, resume: bool = False) -> finetune.FinetuneResult:
    """Fine-tune a policy on sessions and leave it, its metrics and its checkpoints in ``config.run_dir``.

    Full fine-tuning, or adapters with ``model.lora_rank``; what is left in ``policy`` has them merged. Every evaluation
    measures the held-out true responses (loss, perplexity) and one sampled response to each session (relevance, ...).

    Args:
        config: every setting, or a nested dict or the path of a TOML file of them; see ``tppo_fast.finetune_config``.
        resume: continue the newest checkpoint of ``run_dir``, bit for bit as if it had never stopped.

    Raises:
        UserError: bad settings, data or model, before any expensive work.
        TrainingDiverged: the loss or gradient is not finite; a report is in ``run_dir`` and earlier checkpoints stay.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint of the last finished step was saved.
    """
    config = given(config, SFTConfig)
    preflight.check(config, resume)
    with seeding.restored(), open_run_dir(config, resume) as start_from:
        return _train(config, start_from)


def _train(config: SFTConfig, start_from: Path | None) -> finetune.FinetuneResult:
    train_sessions, held_sessions = load_sessions(config)
    held_sessions = held_sessions[: config.train.eval_prompts]
    actor, tokenizer, builder = finetune.build(config)
    prompts, held_prompts = builder.prompts(train_sessions), builder.prompts(held_sessions)
    examples = list(zip(prompts, builder.responses(train_sessions), strict=True))
    held_out = list(zip(held_prompts, builder.responses(held_sessions), strict=True))
    budget = ("sft.microbatch_tokens", config.sft.microbatch_tokens)
    check_examples(config, [*examples, *held_out], actor.lm.config, budget)
    learner = finetune.Learner(actor, config.sft, config.train.steps)
    objective = Supervision(actor, examples, held_out, config.sft, config.seed)
    with contextlib.closing(build_engine(config, tokenizer, actor.device)) as engine:
        held = finetune.Held(engine=engine, prompts=held_prompts, builder=builder)
        return finetune.run(config, config.sft, learner, objective, held, start_from=start_from, name="sft")


def supervise(
    actor: Actor,
    examples: Sequence[Example],
    learn: LearnConfig,
    *,
    steps: int,
    seed: int = 0,
    on_step: Callable[[float], None] = lambda _: None,
) -> None:
    """Train ``actor`` in place, without a run folder; ``on_step`` gets each step's loss in nats per token.

    Raises:
        TrainingDiverged: the loss stopped being finite.
    """
    learner = finetune.Learner(actor, learn, steps)
    objective = Supervision(actor, examples, [], learn, seed)
    for _ in range(steps):
        on_step(learner.take(objective.gradient)["fit/loss"])


@dataclass(frozen=True, slots=True)
class Supervision:
    """Mean negative log-likelihood of the true response tokens: ``-1/A sum_a log pi(token a | before it)``."""

    actor: Actor
    examples: Sequence[Example]
    held_out: Sequence[Example]
    learn: LearnConfig
    seed: int

    def gradient(self, step: int) -> finetune.Metrics:
        chosen = seeding.batch(self.seed, "sft", step, size=self.learn.batch_size, count=len(self.examples))
        batch = packed([self.examples[i] for i in chosen])
        total = 0.0
        for part in parts(batch, self.learn.microbatch_tokens, self.actor.device):
            loss = -logprobs(self.actor, part).sum() / batch.num_actions
            loss.backward()
            total += float(loss.detach())
        return {"fit/loss": total, "fit/tokens": float(batch.num_actions)}

    @torch.no_grad()
    def evaluate(self) -> finetune.Metrics:
        batch = packed(self.held_out)
        total = sum(
            float(logprobs(self.actor, part).sum())
            for part in parts(batch, self.learn.microbatch_tokens, self.actor.device)
        )
        loss = -total / batch.num_actions
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}


def packed(examples: Sequence[Example], *, share_prompts: bool = False) -> RolloutBatch:
    """True responses as one packed batch."""
    rollouts = [
        Rollout(prompt=p, token_ids=ids, logprobs=[0.0] * len(ids), text="", finish_reason="stop", policy_version=0)
        for p, ids in examples
    ]
    return packing.pack(rollouts, [r.logprobs for r in rollouts], share_prompts=share_prompts)


def parts(batch: RolloutBatch, budget: int, device: torch.device) -> list[RolloutBatch]:
    """The batch in microbatches of at most ``budget`` tokens, on ``device``."""
    groups = packing.microbatches(batch, range(batch.num_sequences), budget)
    return [packing.select(batch, group)[0].to(device) for group in groups]


def logprobs(actor: Actor, part: RolloutBatch) -> torch.Tensor:
    """log pi of every response token, [A]."""
    return actor.logprobs(actor.hidden(part)[part.state_index], part.actions, 1.0)[0]


def check_examples(
    config: RunConfig, examples: Sequence[Example], model_config: Any, budget: tuple[str, int] | None = None
) -> None:
    """``check_lengths`` of the longest prompt with its response, or with one that may be sampled to it."""
    sampled = config.rollout.max_new_tokens
    prompt, ids = max(examples, key=lambda example: len(example[0].token_ids) + max(len(example[1]), sampled))
    try:
        check_lengths(len(prompt.token_ids) + max(len(ids), sampled), model_config, budget)
    except UserError as error:
        if len(ids) <= sampled:
            raise
        raise UserError(
            f"user {show(prompt.user_id)}: next_queries have {len(ids)} tokens; {error}; or shorten or remove that session"
        ) from None
