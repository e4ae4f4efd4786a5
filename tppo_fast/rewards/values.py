"""From the class probabilities of a reward model to one reward per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tppo_fast.config import RewardConfig
from tppo_fast.rewards import related

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SCALES = {"paper": (0.0, 1.0, 2.0), "binary": (0.0, 0.0, 1.0), "centred": (0.0, -1.0, 1.0)}
"""Reward of a separator, irrelevant, relevant token. Paper: TPPO, section 3.2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassProbabilities:
    """What a reward model says of one response."""

    values: Float[Tensor, "length 3"]
    """P(separator), P(irrelevant), P(relevant) of each sampled token, fp32; tokens without text are separators."""
    rejected_ends: Sequence[int] = ()
    """The tokens that end a rejected query. Ending it there is the decision that is wrong, and a reward on the query's words,
    which come before, is none for it: each of these tokens costs what a relevant one pays more than an irrelevant one."""

    @property
    def classes(self) -> list[int]:
        """The likeliest class of each token."""
        return self.values.argmax(-1).tolist()


def token_values(probabilities: ClassProbabilities, config: RewardConfig) -> Float[Tensor, " length"]:
    """The reward of each token by ``config.value`` and ``config.scale``, fp64.

    "argmax": the scale's value of the likeliest class (TPPO: argmax_c P(c) with scale "paper"). "soft": its expectation,
    sum_c scale[c] P(c). "tlcr": 2 p - 1. "red": the differences of the mean soft value of the words up to each token.
    ``rejected_ends`` cost the difference of relevant and irrelevant on top, 2 with "tlcr".
    """
    p = probabilities.values.double()
    _, irrelevant, relevant = SCALES["centred" if config.value == "tlcr" else config.scale]
    rewards = _valued(p, config)
    rewards[list(probabilities.rejected_ends)] -= relevant - irrelevant
    return rewards


def _valued(p: Float[Tensor, "length 3"], config: RewardConfig) -> Float[Tensor, " length"]:
    scale = torch.tensor(SCALES[config.scale], dtype=torch.float64)
    if config.value == "argmax":
        return scale[p.argmax(-1)]
    if config.value == "tlcr":
        return related.tlcr(p)
    soft = p @ scale
    return soft if config.value == "soft" else related.red(prefix_means(soft, 1.0 - p[:, 0]), share=config.red_share)


def sentence_value(probabilities: ClassProbabilities, config: RewardConfig) -> Float[Tensor, ""]:
    """One judgement of the whole response: the mean soft value of its words on ``config.scale``, fp64."""
    p = probabilities.values.double()
    soft = p @ torch.tensor(SCALES[config.scale], dtype=torch.float64)
    return prefix_means(soft, 1.0 - p[:, 0])[-1]


def prefix_means(values: Float[Tensor, " length"], weights: Float[Tensor, " length"]) -> Float[Tensor, " length"]:
    """``sum_{s <= t} values_s / sum_{s <= t} weights_s``: the score of the response up to each token.

    ``weights`` are the probabilities of being a word's token, so that separators do not count; 0 before the first one.
    """
    total = weights.cumsum(0)
    return torch.where(total > 1e-6, values.cumsum(0) / total.clamp_min(1e-6), 0.0)
