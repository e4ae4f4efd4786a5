"""Token-level rewards of related work, as functions of one response; every tensor is [length] unless said otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


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
    rewards = share * differences
    rewards[-1] += (1.0 - share) * float(prefix_scores[-1])
    return rewards
