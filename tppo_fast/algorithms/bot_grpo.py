"""GRPO over a group's TOKENS (BoT-GRPO): every token's reward is compared with all tokens of the group; no critic.

A token is paid for itself alone: nothing that follows it enters its advantage (compare gamma = 0 in a GAE).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tppo_fast.algorithms.base import Algorithm, normalised, owners
from tppo_fast.config import PPOConfig
from tppo_fast.data_types import RolloutBatch

if TYPE_CHECKING:
    from jaxtyping import Float


def estimate(
    rewards: Float[Tensor, "A"],
    values: Float[Tensor, "A"],
    final_values: Float[Tensor, "B"],
    batch: RolloutBatch,
    group_size: int,
    config: PPOConfig,
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """A_t = (r_t - mu) / (sigma + eps), mu and (unbiased) sigma over all tokens of all responses to one prompt; 0 where all r are
    equal.

    Returns equal advantages: there is no critic to train on them.
    """
    del values, final_values, config
    group = owners(batch, group_size)  # [A]
    given = rewards.double()
    none = given.new_zeros(batch.num_sequences // group_size)
    counts = none.index_add(0, group, torch.ones_like(given))
    spread = given - (none.index_add(0, group, given) / counts)[group]
    variance = none.index_add(0, group, spread.square()) / (counts - 1).clamp_min(1)
    largest = none.scatter_reduce(0, group, given.abs(), "amax")
    advantages = normalised(spread, variance.sqrt()[group], largest[group]).float()
    return advantages, advantages


ALGORITHM = Algorithm(estimate=estimate, needs_critic=False, placement="token")
