"""Queries that repeat the history, or an earlier query of their response: which tokens of a response pay for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tppo_fast.data_types import Rollout
from tppo_fast.rewards.labels import Span
from tppo_fast.rewards.segment import repetitions, segment


@dataclass(frozen=True, slots=True)
class Copies:
    """Indices of what stands in the repeated queries of one response."""

    words: list[int]
    """The judged spans of repeated queries."""
    ends: list[int]
    """The tokens that end one: the separator's, or the response's last where the policy stopped there."""


def find_copies(rollout: Rollout, tokens: Sequence[Span], judged: Sequence[Span], separator: str) -> Copies:
    """The copies in a response whose ``tokens`` stand for these spans, and whose ``judged`` spans are those or its words.

    A response that was cut at its limit was not ended by anyone, so its last query has no ending token.
    """
    text, found = rollout.text, Copies([], [])
    for start, end in repeated_queries(text, rollout.prompt.history, separator):
        found.words.extend(i for i, (a, b) in enumerate(judged) if a < end and b > start)
        if end < len(text):
            found.ends.append(next(i for i, (a, b) in enumerate(tokens) if a <= end < b))
        elif rollout.finish_reason == "stop":
            found.ends.append(len(tokens) - 1)
    return found


def repeated_queries(response: str, history: Sequence[str], separator: str) -> list[Span]:
    """Where the queries of a response stand that repeat one of the history, or one before them."""
    parts = segment(response, separator)
    return [span for span, again in zip(parts.queries, repetitions(history, parts.texts), strict=True) if again]
