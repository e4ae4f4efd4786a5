"""From the class probabilities of a reward model to one reward per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from tppo_fast.config import RewardConfig
from tppo_fast.rewards import related
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, Span
from tppo_fast.rewards.transfer import transfer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SCALES = {"paper": (0.0, 1.0, 2.0), "binary": (0.0, 0.0, 1.0), "centred": (0.0, -1.0, 1.0)}
"""Reward of a separator, irrelevant, relevant token. Paper: TPPO, section 3.2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassProbabilities:
    """What a reward model says of one response."""

    values: Float[Tensor, "K 3"]
    """P(separator), P(irrelevant), P(relevant) of each of ``spans``, fp32; what has no text is a separator."""
    spans: Sequence[Span] | None = None
    """The characters of the response that each row stands for, starts never decreasing; None: one row per sampled token."""

    @property
    def classes(self) -> list[int]:
        """The likeliest class of each row."""
        return self.values.argmax(-1).tolist()


def token_values(probabilities: ClassProbabilities, config: RewardConfig) -> Float[Tensor, " K"]:
    """The reward of each row, a token or a word, by ``config.value`` and ``config.scale``, fp64.

    "argmax": the scale's value of the likeliest class (TPPO: argmax_c P(c) with scale "paper"). "soft": its expectation,
    sum_c scale[c] P(c). "tlcr": 2 p - 1. "red": the differences of the mean soft value of the words up to each token.
    """
    p = probabilities.values.double()
    scale = torch.tensor(SCALES[config.scale], dtype=torch.float64)
    if config.value == "argmax":
        return scale[p.argmax(-1)]
    if config.value == "tlcr":
        return related.tlcr(p)
    soft = p @ scale
    return soft if config.value == "soft" else related.red(prefix_means(soft, 1.0 - p[:, 0]), share=config.red_share)


def on_spans(probabilities: ClassProbabilities, target: Sequence[Span], text: str) -> ClassProbabilities:
    """The same of other spans of the response's text: the mean over their visible characters, or a separator for certain."""
    assert probabilities.spans is not None
    carried = torch.from_numpy(transfer(probabilities.values.numpy(), probabilities.spans, target, text)).float()
    carried[carried.sum(-1) == 0.0, 0] = 1.0
    return ClassProbabilities(values=carried, spans=target)


def gap(config: RewardConfig) -> float:
    """What a relevant token pays more than an irrelevant one."""
    _, irrelevant, relevant = SCALES["centred" if config.value == "tlcr" else config.scale]
    return relevant - irrelevant


def without_relevance(probabilities: ClassProbabilities, rows: Sequence[int]) -> ClassProbabilities:
    """The same with P(relevant) of these rows given to irrelevant."""
    values, rejected = probabilities.values.clone(), list(rows)
    values[rejected, IRRELEVANT] += values[rejected, RELEVANT]
    values[rejected, RELEVANT] = 0.0
    return replace(probabilities, values=values)


def sentence_value(probabilities: ClassProbabilities, config: RewardConfig) -> Float[Tensor, ""]:
    """One judgement of the whole response: the mean soft value of its words on ``config.scale``, fp64."""
    p = probabilities.values.double()
    soft = p @ torch.tensor(SCALES[config.scale], dtype=torch.float64)
    return prefix_means(soft, 1.0 - p[:, 0])[-1:].sum()  # 0 of no words


def prefix_means(values: Float[Tensor, " length"], weights: Float[Tensor, " length"]) -> Float[Tensor, " length"]:
    """``sum_{s <= t} values_s / sum_{s <= t} weights_s``: the score of the response up to each token.

    ``weights`` are the probabilities of being a word's token, so that separators do not count; 0 before the first one.
    """
    total = weights.cumsum(0)
    return torch.where(total > 1e-6, values.cumsum(0) / total.clamp_min(1e-6), 0.0)
