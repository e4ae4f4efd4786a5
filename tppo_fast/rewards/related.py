"""Token-level rewards of related work, as functions of one response; every tensor is [length] unless said otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def rto(
    dpo_logprobs: Float[Tensor, " length"],
    ref_logprobs: Float[Tensor, " length"],
    logprobs: Float[Tensor, " length"],
    terminal: float,
    *,
    b1: float = 0.05,
    b2: float = 0.01,
    clip: float = 0.05,
) -> Float[Tensor, " length"]:
    """``r_t = clamp(b1 log(pi_dpo / pi_ref), -clip, clip) - b2 log(pi / pi_ref)``, plus ``terminal`` on the last token.

    Args:
        dpo_logprobs: log-probability of each token under the policy that DPO trained, nats.
        ref_logprobs: the same under the reference policy.
        logprobs: the same under the policy that learns. The second term is PPO's KL penalty (k1): with
            ``ppo.kl_placement = "reward"`` it is there already, so pass ``b2=0``.
        terminal: the sentence's reward.

    Source: RTO (arXiv 2404.18922); the coefficients are those of its code.
    """
    rewards = (b1 * (dpo_logprobs - ref_logprobs)).clamp(-clip, clip) - b2 * (logprobs - ref_logprobs)
    return _with_last(rewards, terminal)


def tlcr(probabilities: Float[Tensor, "length 3"]) -> Float[Tensor, " length"]:
    """``r_t = 2 p_t - 1`` in [-1, 1], p the probability of "relevant" among relevant and irrelevant; separators get 0.

    A token is a separator when that is its likeliest class. Source: TLCR (arXiv 2407.16574), whose discriminator has the
    classes positive, neutral and negative; ours are relevant, separator and irrelevant.
    """
    relevant, irrelevant = probabilities[:, 2], probabilities[:, 1]
    rewards = 2.0 * relevant / (relevant + irrelevant).clamp_min(1e-12) - 1.0
    return torch.where(probabilities.argmax(-1) == 0, 0.0, rewards)


def red(prefix_scores: Float[Tensor, " length"], *, share: float = 1.0) -> Float[Tensor, " length"]:
    """``r_t = share (R(y<=t) - R(y<t))``, plus ``(1 - share) R(y)`` on the last token; ``R`` of no tokens is 0.

    The sum over the response is R(y) whatever ``share`` is.

    Args:
        prefix_scores: R(y<=t), the score of the response up to and including each token.
        share: beta_c of the paper: how much of the reward is redistributed.

    Source: RED (arXiv 2411.08302).
    """
    differences = torch.diff(prefix_scores, prepend=prefix_scores.new_zeros(1))
    return _with_last(share * differences, (1.0 - share) * float(prefix_scores[-1:].sum()))


def abc(attention: Float[Tensor, " length"], reward: float, *, share: float = 0.5) -> Float[Tensor, " length"]:
    """``r_t = share alpha_t r``, plus ``(1 - share) r`` on the last token. The sum over the response is ``reward``.

    Args:
        attention: how much the reward model attends to each token where it makes the sentence's score (last layer, mean
            over heads): not negative. It is scaled to sum to 1 over the response: alpha.
        reward: r, the sentence's score.
        share: b of the paper.

    Source: ABC, attention-based credit (arXiv 2402.00782).
    """
    return _with_last(share * reward * attention / attention.sum(), (1.0 - share) * reward)


def _with_last(rewards: Tensor, bonus: float) -> Tensor:
    rewards = rewards.clone()
    rewards[-1:] += bonus
    return rewards
