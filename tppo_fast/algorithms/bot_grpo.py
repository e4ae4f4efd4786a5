"""GRPO over a group's TOKENS (BoT-GRPO): every token's reward is compared with all tokens of the group; no critic.

A token is paid for itself alone: nothing that follows it enters its advantage (compare gamma = 0 in a GAE).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tppo_fast.algorithms.base import Algorithm, owners
from tppo_fast.config import PPOConfig
from tppo_fast.data_types import RolloutBatch

if TYPE_CHECKING:
    from jaxtyping import Float

EPSILON = 1e-6
"""Keeps a group whose tokens all have one reward at advantage 0."""


def estimate(
    rewards: Float[Tensor, "A"],
    values: Float[Tensor, "A"],
    final_values: Float[Tensor, "B"],
    batch: RolloutBatch,
    group_size: int,
    config: PPOConfig,
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """A_t = (r_t - mu) / (sigma + eps), mu and (unbiased) sigma over all tokens of all responses to one prompt.

    Returns equal advantages: there is no critic to train on them.
    """
    del values, final_values, config
    group = owners(batch, group_size)  # [A]
    none = rewards.new_zeros(batch.num_sequences // group_size)
    counts = none.index_add(0, group, torch.ones_like(rewards))
    spread = rewards - (none.index_add(0, group, rewards) / counts)[group]
    variance = none.index_add(0, group, spread.square()) / (counts - 1).clamp_min(1)
    advantages = spread / (variance.sqrt()[group] + EPSILON)
    return advantages, advantages


ALGORITHM = Algorithm(estimate=estimate, needs_critic=False, placement="token")
