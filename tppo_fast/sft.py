"""Supervised fine-tuning on packed sessions: history -> next queries, loss on the response alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import get_scheduler

from tppo_fast import packing, seeding
from tppo_fast.data_types import Prompt, Rollout, RolloutBatch
from tppo_fast.errors import TrainingDiverged
from tppo_fast.model import Actor


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTSettings:
    """How to supervise."""

    steps: int
    """Optimizer steps."""
    batch_size: int = 64
    """Sessions in each step."""
    lr: float = 1e-3
    """Peak learning rate; cosine decay to zero after the warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    microbatch_tokens: int = 8192
    """Most tokens in one forward pass."""
    seed: int = 0
    """Decides the order of the sessions."""


def supervise(
    actor: Actor,
    examples: Sequence[tuple[Prompt, Sequence[int]]],
    settings: SFTSettings,
    on_step: Callable[[float], None] = lambda _: None,
) -> None:
    """Train ``actor`` in place on (prompt, response tokens) pairs; ``on_step`` gets each step's loss in nats per token.

    Raises:
        TrainingDiverged: the loss stopped being finite.
    """
    optimizer = torch.optim.AdamW(actor.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, settings.warmup_steps, settings.steps)
    for step in range(settings.steps):
        order = torch.randint(
            len(examples), (settings.batch_size,), generator=seeding.generator(settings.seed, "sft", step)
        )
        batch = _packed([examples[i] for i in order.tolist()])
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(actor, batch, settings.microbatch_tokens)
        norm = nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        if not (torch.isfinite(norm) and loss == loss):
            raise TrainingDiverged({"step": step + 1, "loss": loss, "grad_norm": float(norm)})
        optimizer.step()
        scheduler.step()
        on_step(loss)
    optimizer.zero_grad(set_to_none=True)


def _packed(examples: Sequence[tuple[Prompt, Sequence[int]]]) -> RolloutBatch:
    rollouts = [
        Rollout(prompt=p, token_ids=ids, logprobs=[0.0] * len(ids), text="", finish_reason="stop", policy_version=0)
        for p, ids in examples
    ]
    return packing.pack(rollouts, [r.logprobs for r in rollouts])


def _backward(actor: Actor, batch: RolloutBatch, budget: int) -> float:
    """Gradient of the mean negative log-likelihood per response token; returns it in nats."""
    total = 0.0
    for sequences in packing.microbatches(batch, range(batch.num_sequences), budget):
        part = packing.select(batch, sequences)[0].to(actor.device)
        logprobs, _ = actor.logprobs(actor.hidden(part)[part.state_index], part.actions, 1.0)
        loss = -logprobs.sum() / batch.num_actions
        loss.backward()
        total += float(loss.detach())
    return total
