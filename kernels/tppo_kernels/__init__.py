"""Fused ops of token-level PPO, reusable without the trainer. Needs torch alone; equations in ``reference``."""

from __future__ import annotations

from .ops import gae, linear_logprobs, linear_token_loss, logprobs_from_logits, ppo_loss, whiten, whitening_stats

__all__ = [
    "gae",
    "linear_logprobs",
    "linear_token_loss",
    "logprobs_from_logits",
    "ppo_loss",
    "whiten",
    "whitening_stats",
]
