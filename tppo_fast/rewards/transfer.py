"""From the tokens of one tokenizer to those of another, by character offsets: a reward model rarely shares the policy's.

A reward model reads the TEXT of a response with its own tokenizer (``token_model.Reader``); what it says of its tokens
reaches the policy's sampled tokens, whose spans ``alignment.token_spans`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import Span

if TYPE_CHECKING:
    from jaxtyping import Float


def transfer(
    scores: Float[np.ndarray, "S ..."],
    source: Sequence[Span],
    target: Sequence[Span],
    text: str,
    *,
    default: float = 0.0,
) -> Float[np.ndarray, "T ..."]:
    """Scores of ``source`` tokens, carried onto ``target`` tokens of the same text.

    A target token gets the mean of the scores at its visible characters. White space does not count, since tokenizers put
    it into a word's token, into one of its own or into none; a target token with nothing else (a space, eos), or whose
    characters no source token covers, gets ``default``. A character that several tokens of one tokenizer share, each holding
    some of its bytes, is divided evenly between them in order. So equal tokens give equal scores exactly, a constant
    stays that constant, and the sum of score times characters is kept wherever both cover the text.

    Args:
        scores: one number, or one row such as class probabilities, per source token.
        source: the span of each source token.
        target: the span of each target token, from ``alignment.token_spans``.
        text: what the spans index.
        default: score of a target token that no source token touches.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) != len(source):
        raise UserError(f"scores have {len(scores)} rows for {len(source)} source tokens: give one per token")
    shared = overlap(source, target, text)
    covered = shared.sum(1, keepdims=True)  # [T 1]
    weights = shared / np.where(covered > 0.0, covered, 1.0)
    carried = np.tensordot(weights, scores, axes=1)  # [T ...]
    return np.where(covered.reshape(len(target), *[1] * (scores.ndim - 1)) > 0.0, carried, default)


def spread(
    amounts: Float[np.ndarray, " S"], source: Sequence[Span], target: Sequence[Span], text: str
) -> Float[np.ndarray, " T"]:
    """Each source span's amount, divided over the target tokens by how many of its visible characters each holds.

    The sum is kept, however the text is cut into tokens; a span without a visible character has nobody to give to.
    """
    shared = overlap(source, target, text)
    total = shared.sum(0)  # [S]
    return shared @ (amounts / np.where(total > 0.0, total, 1.0))


def overlap(source: Sequence[Span], target: Sequence[Span], text: str) -> Float[np.ndarray, "T S"]:
    """How many visible characters each target token shares with each source token, shared characters divided."""
    visible = np.cumsum([0, *(not character.isspace() for character in text)])  # visible characters before each place
    a, b = (_divided([(int(visible[s]), int(visible[e])) for s, e in spans]) for spans in (source, target))
    shared = np.minimum(a[None, :, 1], b[:, None, 1]) - np.maximum(a[None, :, 0], b[:, None, 0])
    return np.maximum(shared, 0.0)


def _divided(spans: Sequence[Span]) -> Float[np.ndarray, "n 2"]:
    """Spans as intervals that do not overlap: the k tokens that share a character get a k-th of it each, in order."""
    sharers: dict[int, list[int]] = {}
    for token, (start, end) in enumerate(spans):
        if start < end:
            for character in {start, end - 1}:
                sharers.setdefault(character, []).append(token)
    intervals = np.zeros((len(spans), 2))
    for token, (start, end) in enumerate(spans):
        if start < end:
            first, last = sharers[start], sharers[end - 1]
            low = start + first.index(token) / len(first)
            high = end - 1 + (last.index(token) + 1) / len(last)
            intervals[token] = low, high
    return intervals
