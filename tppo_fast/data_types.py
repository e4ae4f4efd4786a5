"""The types that travel through the loop: Prompt -> Rollout -> RolloutBatch -> TrainBatch -> LossOutput.

Two index spaces, no masks. N tokens is what the model reads; A actions is what was sampled and what PPO computes on.
Every [A] tensor at a belongs to action token a: ``logprobs[a] = log pi(token a | everything before it)``,
``values[a] = V(state before token a)``, ``rewards[a]`` = the reward FOR that token.

A worked example, two sequences (prompt|response): ``p0 p1|a0 a1`` and ``q0|b0``, packed in this order:

    token index      0   1   2   3   4   5
    token_ids       p0  p1  a0  a1  q0  b0          N = 6
    position_ids     0   1   2   3   0   1
    cu_seqlens       0               4       6      S = 2 segments
    action_index             2   3       5          A = 3
    state_index              1   2       4          hidden state that predicts each action
    cu_actions       0 -> 2 -> 3                    B = 2

When n responses share one prompt's tokens (``pack(..., share_prompts=True)``) the prompt is a segment of its own and
``prefix`` says which segment each response continues: ``p0 p1|a0 a1`` and ``p0 p1|c0`` become three segments
``[p0 p1] [a0 a1] [c0]`` with ``prefix = [-1, 0, 0]``, position ids ``0 1 2 3 2`` and state_index ``1 2 1``.
Nobody but ``packing`` computes these tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One search history, ready for the policy."""

    token_ids: Sequence[int]
    """The rendered prompt in the policy's vocabulary, special tokens included."""
    user_id: str
    """Whose session it is; one user never stands in both the training and the evaluation split."""
    history: Sequence[str]
    """The user's earlier queries, oldest first."""
    next_queries: Sequence[str]
    """What the user really asked next: the target of supervision and of the labellers."""
    relevant_queries: Sequence[str]
    """Every query known to be relevant; equals ``next_queries`` where no wider truth is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response."""

    prompt: Prompt
    """The prompt it answers."""
    token_ids: Sequence[int]
    """The sampled tokens, the end-of-sequence token included when it was sampled. Never empty."""
    logprobs: Sequence[float]
    """Log-probability of each sampled token under the policy that sampled it, at the sampling temperature."""
    text: str
    """The response decoded without special tokens."""
    finish_reason: Literal["stop", "length"]
    """``stop``: the policy ended it. ``length``: it was cut at max_new_tokens."""
    policy_version: int
    """The version given to the engine's last ``load_weights``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Rollouts packed for the model, with one reward per action. S segments, B sequences, N tokens, A actions."""

    token_ids: Int[Tensor, "N"]
    """Packed tokens, int64."""
    position_ids: Int[Tensor, "N"]
    """Position of each token in its own sequence, a shared prompt counted in, int64."""
    cu_seqlens: Int[Tensor, "S+1"]
    """Where each segment starts among the tokens, int32, from 0 to N. A token attends to its segment, causally. It and
    ``prefix`` stay on the CPU: they are what the host plans the attention with, and must not be fetched from a device."""
    prefix: Int[Tensor, "S"]
    """The segment each segment continues and fully attends to, or -1, int64."""
    action_index: Int[Tensor, "A"]
    """Where each action sits among the tokens, int64."""
    state_index: Int[Tensor, "A"]
    """The token whose hidden state predicts each action, int64: action_index - 1 unless the prompt is shared."""
    final_index: Int[Tensor, "B"]
    """The token whose hidden state follows a sequence's last action: where a truncated response bootstraps, int64."""
    cu_actions: Int[Tensor, "B+1"]
    """Where each sequence's actions start, int32, from 0 to A."""
    behaviour_logprobs: Float[Tensor, "A"]
    """Log-probabilities reported by the rollout engine, fp32."""
    rewards: Float[Tensor, "A"]
    """The reward for each action, fp32, before any KL penalty."""
    truncated: Bool[Tensor, "B"]
    """True where the response was cut at max_new_tokens."""

    @property
    def num_sequences(self) -> int:
        return len(self.cu_actions) - 1

    @property
    def num_actions(self) -> int:
        return len(self.action_index)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def actions(self) -> Int[Tensor, "A"]:
        """The sampled token ids."""
        return self.token_ids[self.action_index]

    def to(self, device: torch.device | str) -> RolloutBatch:
        """All tensors but the attention structure on ``device``, without waiting for the copies."""
        moved = {f.name: to_device(getattr(self, f.name), device) for f in fields(self) if f.name not in _ON_HOST}
        return replace(self, **moved)


_ON_HOST = ("cu_seqlens", "prefix")


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on ``device``. To CUDA it goes through pinned memory, and nobody waits for the copy."""
    if not str(device).startswith("cuda") or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRows:
    """What the loss reads of some actions: any A rows of a training batch, all [A], fp32, no gradient."""

    old_logprobs: Float[Tensor, "A"]
    """The ratio's denominator: the policy's log-probabilities before the update."""
    ref_logprobs: Float[Tensor, "A"]
    """The frozen reference policy's log-probabilities (equal to old_logprobs where no KL term is used)."""
    values: Float[Tensor, "A"]
    """V(state before the action) before the update, for the clipped value loss."""
    advantages: Float[Tensor, "A"]
    """Per-token advantages, whitened where configured."""
    returns: Float[Tensor, "A"]
    """The critic's regression targets."""
    importance_weights: Float[Tensor, "A"]
    """Truncated weights pi_old / pi_behaviour of the policy loss; 1 where rollouts are fresh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch(TrainRows):
    """A packed batch with everything the update reads; the rows live on the training device."""

    rollouts: RolloutBatch
    """The packed rollouts, on the CPU until a microbatch is sent to the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What a loss function returns: SUMS over its actions; the caller divides once by the step's action count."""

    loss: Float[Tensor, ""]
    """The summed loss, differentiable."""
    metrics: dict[str, Float[Tensor, ""]]
    """Summed metrics, detached; each is defined in ``tppo_fast.metrics.GLOSSARY``."""
