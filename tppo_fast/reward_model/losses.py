"""The two losses of the token reward model (TPPO, section 3.2), and the sampling that keeps its classes in balance.

``L = 0.4 L_local + 0.6 L_global``. What the paper leaves open, and what is done here:

- n: valid tokens in L_local, responses in L_global, so that both are means and their weights do not depend on length.
- argmax has no gradient, so L_global uses the soft value ``sum_c c P(c)``.
- L_global's mean is over a response's valid tokens of class 1 or 2, and R_global is the sentence label in the same units,
  1 irrelevant and 2 relevant: with separators (0) in the mean no response could reach its label.
- w_c: inverse class frequency, with mean 1 over the training tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tppo_fast.rewards.labels import SEPARATOR

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def local_loss(
    logits: Float[Tensor, "K 3"], labels: Int[Tensor, " K"], valid: Bool[Tensor, " K"], weights: Float[Tensor, "3"]
) -> Float[Tensor, ""]:
    """``-sum_{t in V} w_{label_t} log P(label_t)``, SUMMED; divide by the number of valid tokens."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * weights[labels])[valid].sum()


def global_loss(
    logits: Float[Tensor, "K 3"],
    labels: Int[Tensor, " K"],
    valid: Bool[Tensor, " K"],
    owner: Int[Tensor, " K"],
    sentence: Int[Tensor, " B"],
) -> Float[Tensor, ""]:
    """``sum_i (mean_{t in V_i} sum_c c P(c) - (1 + sentence_i))^2``, SUMMED over the responses with a valid word token.

    Args:
        owner: the response, 0 to B - 1, that each token belongs to.
        sentence: 0 irrelevant, 1 relevant.
    """
    words = valid & (labels != SEPARATOR)
    soft = logits.softmax(-1) @ torch.arange(3.0, device=logits.device)  # [K]
    count = torch.zeros(len(sentence), device=logits.device).index_add(0, owner[words], torch.ones_like(soft[words]))
    total = torch.zeros(len(sentence), device=logits.device).index_add(0, owner[words], soft[words])
    error = total / count.clamp_min(1.0) - (1.0 + sentence)
    return (error.square() * (count > 0)).sum()


def class_weights(counts: Int[Tensor, "3"]) -> Float[Tensor, "3"]:
    """``w_c = N / (C N_c)`` over the classes that occur, C of them; 0 for the others. The mean over tokens is 1."""
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp_min(1).double())
    return torch.where(present, weights, 0.0).float()


def balanced(labels: Int[Tensor, " K"], max_ratio: float, generator: torch.Generator) -> Bool[Tensor, " K"]:
    """The probability mask: False for tokens of the more frequent of class 1 and 2 that would exceed ``max_ratio`` to 1.

    The kept ones are drawn without replacement over the whole data set; class 0 stays. Where a class is absent nothing is
    dropped: no ratio could be kept.
    """
    keep = torch.ones(len(labels), dtype=torch.bool)
    places = [(labels == c).nonzero()[:, 0] for c in (1, 2)]
    few, many = sorted(places, key=len)
    allowed = int(max_ratio * len(few))
    if len(few) and len(many) > allowed:
        order = torch.randperm(len(many), generator=generator)
        keep[many[order[allowed:]]] = False
    return keep
