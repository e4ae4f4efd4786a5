"""PPO for language models as it is usually written, in one file of plain PyTorch: the shape that the lean loop is compared with.

Padded batches, a prompt repeated for each of its responses, a critic and a reference with bodies of their own, logits of
every response position at once. Same objective as ``tppo_fast.losses.ppo`` with its default settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tppo_fast.data_types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """B sequences: prompts padded on the left to P tokens, responses on the right to R."""

    ids: Tensor
    """[B, P + R]"""
    mask: Tensor
    """[B, P + R], True at tokens."""
    actions: Tensor
    """[B, R], True at sampled tokens."""
    rewards: Tensor
    """[B, R], 0 at padding."""


def pad(rollouts: Sequence[Rollout], rewards: Sequence[Tensor]) -> Padded:
    """Rollouts and their per-token rewards as rectangles."""
    p, r = max(len(x.prompt.token_ids) for x in rollouts), max(len(x.token_ids) for x in rollouts)
    ids = torch.zeros(len(rollouts), p + r, dtype=torch.int64)
    mask, paid = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(len(rollouts), r)
    for b, (x, reward) in enumerate(zip(rollouts, rewards, strict=True)):
        start, end = p - len(x.prompt.token_ids), p + len(x.token_ids)
        ids[b, start:end] = torch.tensor([*x.prompt.token_ids, *x.token_ids])
        mask[b, start:end] = True
        paid[b, : len(x.token_ids)] = reward
    return Padded(ids=ids, mask=mask, actions=mask[:, p:], rewards=paid)


class Baseline:
    """Policy, critic and reference, and one AdamW for what learns."""

    def __init__(self, policy: Any, critic: Any, value_head: nn.Linear, reference: Any, lr: float) -> None:
        self.policy, self.critic, self.value_head, self.reference = policy, critic, value_head, reference
        actor = set(policy.parameters())
        own = [p for p in critic.parameters() if p not in actor]  # none, where one body serves both
        self.learned = [[*actor], [*own, *value_head.parameters()]]
        self.optimizer = torch.optim.AdamW([p for group in self.learned for p in group], lr=lr, weight_decay=0.0)

    def inputs(self, batch: Padded) -> dict[str, Any]:
        positions = (batch.mask.long().cumsum(1) - 1).clamp_min(0)
        return {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": positions, "use_cache": False}

    def logprobs(self, lm: Any, batch: Padded) -> tuple[Tensor, Tensor]:
        """(log-probability of each sampled token, entropy), [B, R]."""
        width = batch.actions.shape[1]
        logits = lm(**self.inputs(batch)).logits[:, -width - 1 : -1].float()
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, batch.ids[:, -width:, None])[..., 0], entropy

    def values(self, batch: Padded) -> Tensor:
        """V(state before each sampled token), [B, R]."""
        width = batch.actions.shape[1]
        hidden = self.critic(**self.inputs(batch)).last_hidden_state
        return self.value_head(hidden[:, -width - 1 : -1])[..., 0]

    @torch.no_grad()
    def prepare(self, batch: Padded, *, kl_coef: float, gamma: float, lam: float) -> dict[str, Tensor]:
        """Old log-probabilities, values, whitened advantages and returns, [B, R]."""
        old, reference, values = (
            self.logprobs(self.policy, batch)[0],
            self.logprobs(self.reference, batch)[0],
            self.values(batch),
        )
        rewards, live = (batch.rewards - kl_coef * (old - reference)) * batch.actions, batch.actions.float()
        values = values * live
        advantages, last = torch.zeros_like(values), torch.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            after = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros(len(values))
            last = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * last) * live[:, t]
            advantages[:, t] = last
        returns, found = advantages + values, advantages[batch.actions]
        advantages = (advantages - found.mean()) / found.std() * live
        return {"old": old, "values": values, "advantages": advantages, "returns": returns}

    def update(
        self, batch: Padded, prepared: dict[str, Tensor], *, clip: float, value_coef: float, max_grad_norm: float
    ) -> dict[str, float]:
        """One clipped step on the whole batch; the value moves by at most ``clip``, too."""
        live, count = batch.actions, batch.actions.sum()
        logp, entropy = self.logprobs(self.policy, batch)
        values, old_values = self.values(batch), prepared["values"]
        ratio = (logp - prepared["old"]).exp()
        advantages = prepared["advantages"]
        policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum((values - prepared["returns"]) ** 2, (near - prepared["returns"]) ** 2)
        value = 0.5 * error
        self.optimizer.zero_grad(set_to_none=True)
        ((policy + value_coef * value)[live].sum() / count).backward()
        norms = [nn.utils.clip_grad_norm_(group, max_grad_norm) for group in self.learned]
        self.optimizer.step()
        means = {"ppo/policy_loss": policy, "ppo/value_loss": value, "ppo/entropy": entropy}
        return {**{k: float(x[live].mean()) for k, x in means.items()}, "ppo/grad_norm": float(norms[0])}
