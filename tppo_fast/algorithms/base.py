"""What an algorithm is, and the groups that critic-free ones compare within."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from tppo_fast.config import PPOConfig, RewardConfig
from tppo_fast.data_types import RolloutBatch
from tppo_fast.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Estimator(Protocol):
    def __call__(
        self,
        rewards: Float[Tensor, "A"],
        values: Float[Tensor, "A"],
        final_values: Float[Tensor, "B"],
        batch: RolloutBatch,
        group_size: int,
        config: PPOConfig,
    ) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
        """(advantages before whitening, returns), both [A].

        Args:
            rewards: [A], the KL penalty taken off where it stands in the reward.
            values: [A] of the critic; zeros where there is none.
            final_values: [B], the value after each response; zeros where there is no critic.
            batch: says which actions belong to which response, and which were cut.
            group_size: responses to one prompt, next to each other in the batch.
            config: gamma, lambdas and bootstrapping.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One method; the values of ``tppo_fast.algorithms.ALGORITHMS``."""

    estimate: Estimator
    """From rewards and values to advantages and returns."""
    needs_critic: bool
    """Without one there are no critic parameters, passes or optimizer states, and advantages are not whitened again."""
    placement: Literal["token", "last", "sentence"] | None
    """What ``reward.placement`` must be; None leaves it to the config."""

    def reward_config(self, config: RewardConfig) -> RewardConfig:
        """The reward section with this algorithm's placement."""
        return config if self.placement is None else config.model_copy(update={"placement": self.placement})


EPSILON = 1e-6
"""What normalisation adds to a standard deviation, in reward units."""


def normalised(spread: Tensor, deviation: Tensor, largest: Tensor) -> Tensor:
    """``spread / (deviation + EPSILON)``; 0 where the rewards differ by rounding alone: by 1e-6 of the ``largest`` of a group."""
    return torch.where(deviation <= 1e-6 * largest, 0.0, spread / (deviation + EPSILON))


def owners(batch: RolloutBatch, group_size: int = 1) -> Int[Tensor, "A"]:
    """The group of each action (with ``group_size`` 1 its response): responses to one prompt stand next to each other.

    The device is not waited for: how many actions there are is said, not asked.

    Raises:
        UserError: the batch does not hold whole groups.
    """
    if group_size < 1 or batch.num_sequences % group_size:
        raise UserError(
            f"{batch.num_sequences} responses cannot be groups of rollout.samples_per_prompt = {group_size}: give whole groups"
        )
    lengths = batch.cu_actions.diff().long()  # [B]
    group = torch.arange(len(lengths), device=lengths.device) // group_size
    return group.repeat_interleave(lengths, output_size=batch.num_actions)
