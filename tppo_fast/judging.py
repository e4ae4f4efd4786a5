"""Who wins between two responses: a judge asked in both orders, or a labeller's judgement of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, Labeller, Labels

Winner = Literal["first", "second", "tie"]


class PairJudge(Protocol):
    """Says which of two responses to one history is better; any callable will do."""

    def __call__(self, history: Sequence[str], next_queries: Sequence[str], first: str, second: str, /) -> Winner: ...


def once(labeller: Labeller) -> Labeller:
    """The same labeller, asked once for each distinct (history, next queries, response)."""
    known: dict[tuple[tuple[str, ...], tuple[str, ...], str], Labels] = {}

    def label(history: Sequence[str], next_queries: Sequence[str], response_text: str, /) -> Labels:
        key = (tuple(history), tuple(next_queries), response_text)
        if key not in known:
            known[key] = labeller(history, next_queries, response_text)
        return known[key]

    return label


def by_labels(labeller: Labeller) -> PairJudge:
    """The judge that labels each response alone: the better sentence label wins, then the larger share of relevant words."""

    def judge(history: Sequence[str], next_queries: Sequence[str], first: str, second: str, /) -> Winner:
        one, two = (_rank(labeller(history, next_queries, text)) for text in (first, second))
        return "tie" if one == two else "first" if one > two else "second"

    return judge


def _rank(labels: Labels) -> tuple[int, float]:
    words = [c for c in labels.classes if c in (IRRELEVANT, RELEVANT)]
    return labels.sentence, words.count(RELEVANT) / len(words) if words else 0.0


def duels(judge: PairJudge, a: Sequence[Rollout], b: Sequence[Rollout]) -> np.ndarray:
    """+1, 0 or -1 for each pair of responses to the same prompt: a wins, tie, b wins, [B] fp64.

    Each pair is judged twice with the order swapped; a judge that contradicts itself has not seen a difference: a tie.

    Raises:
        UserError: the sides answer different prompts, or the judge answers with something else than a ``Winner``.
    """
    verdicts = []
    for one, two in zip(a, b, strict=True):
        given = one.prompt
        if (given.user_id, given.history) != (two.prompt.user_id, two.prompt.history):
            raise UserError("the two sides answer different prompts: evaluate both on the same sessions")
        forward = _ask(judge, one, two)
        backward = -_ask(judge, two, one)
        verdicts.append(forward if forward == backward else 0)
    return np.array(verdicts, dtype=np.float64)


def _ask(judge: PairJudge, first: Rollout, second: Rollout) -> int:
    answer = judge(first.prompt.history, first.prompt.next_queries, first.text, second.text)
    values = {"first": 1, "tie": 0, "second": -1}
    if not isinstance(answer, str) or answer not in values:
        raise UserError(f'the pair judge answered {answer!r}: return "first", "second" or "tie"')
    return values[answer]
