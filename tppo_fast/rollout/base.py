"""The protocol every rollout engine follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample. Only the full distribution at a temperature: anything narrower biases the PPO ratio."""

    n: int = 1
    """Responses per prompt."""
    max_new_tokens: int
    """Longest response."""
    temperature: float = 1.0
    """Logits are divided by it, above 0; log-probabilities are taken at it."""
    greedy: bool = False
    """Take the most likely token (evaluation only); log-probabilities are still those of the distribution."""
    top_p: float = 1.0
    """Must be 1."""
    top_k: int = 0
    """Must be 0 (off)."""
    seed: int = 0
    """Same weights, prompts, parameters and seed give the same responses."""

    def __post_init__(self) -> None:
        if self.top_p < 1.0 or self.top_k > 0:
            raise UserError(
                f"top_p = {self.top_p}, top_k = {self.top_k}: log-probabilities of a truncated distribution would bias the "
                "PPO ratio; use top_p = 1.0 and top_k = 0"
            )
        if not self.temperature > 0.0 or self.n < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"temperature = {self.temperature}, n = {self.n}, max_new_tokens = {self.max_new_tokens}: all must be "
                "above 0 (for greedy decoding set greedy = True)"
            )


class RolloutEngine(Protocol):
    """Samples responses from a copy of the policy's weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """``len(prompts) * sampling.n`` rollouts, the n of one prompt next to each other, in the prompts' order.

        Raises:
            UserError: no weights were loaded yet, or the parameters cannot be honoured exactly.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace every weight; rollouts carry ``version`` from now on.

        Raises:
            UserError: a name or shape does not fit, or a weight of the engine is missing from ``weights``.
        """
        ...

    def sleep(self) -> None:
        """Free what can be freed until the next ``load_weights``; called only where ``vllm.sleep`` asks for it."""
        ...

    def close(self) -> None:
        """Release memory and processes; safe to call twice."""
        ...
