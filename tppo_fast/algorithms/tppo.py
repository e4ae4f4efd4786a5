"""TPPO (arXiv 2411.00722): a reward on every token, a token critic, GAE. Where ``reward.placement`` says so, on the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tppo_fast import advantages
from tppo_fast.algorithms.base import Algorithm
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
    """A_t = sum_k (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}) within each response: GAE (arXiv 1506.02438, eq. 16).

    Groups play no part.
    """
    del group_size
    return advantages.estimate(rewards, values, final_values, batch.truncated, batch.cu_actions, config)


ALGORITHM = Algorithm(estimate=estimate, needs_critic=True, placement=None)
