"""GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2): a response is compared with the others to its prompt; no critic.

The loss is normalised by the tokens of the whole optimizer step, as ours always is (DAPO, arXiv 2503.14476, eq. 8), not by
each response's own length. The KL stands in the loss, as published.
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
    """A_t = (R_i - mean(R)) / (std(R) + eps) for every token of response i; R_i is the sum of its rewards; 0 where all are equal.

    Mean and (unbiased) standard deviation are taken over the responses to one prompt. Returns equal advantages: there is
    no critic to train on them.
    """
    del values, final_values, config
    owners(batch, group_size)  # refuses a batch without whole groups
    owner = owners(batch)  # [A]
    none = torch.zeros(batch.num_sequences, dtype=torch.float64, device=rewards.device)
    totals = none.index_add(0, owner, rewards.double()).view(-1, group_size)  # [B / G, G]
    spread = totals - totals.mean(1, keepdim=True)
    largest = totals.abs().amax(1, keepdim=True)
    advantages = normalised(spread, totals.std(1, keepdim=True), largest).float().flatten()[owner]
    return advantages, advantages


ALGORITHM = Algorithm(estimate=estimate, needs_critic=False, placement="sentence")
