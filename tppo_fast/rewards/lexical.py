"""The lexical labeller: a word is relevant when the true next queries use it (TPPO's labels without a labelling LLM).

The rules, where the paper leaves them open:
    words      ``words.word_spans``; compared by Snowball stem of the NFKC-casefolded form.
    relevant   a true next query holds the stem together with all relevant stems before it in the same generated query:
               words are judged as part of the query they stand in.
    causal     a word's label depends on the words before it, never on later ones (novelty is the exception): a reward that
               a later action takes back could not be credited to that action.
    repetition must not pay: within one generated query a stem is relevant at most as often as in that true query, over the
               response at most as often as in all distinct true queries together. Only relevant occurrences use up the
               allowance, so a wrong repetition takes nothing from a later right word.
    length     queries after the first ``num_queries`` are irrelevant.
    novelty    a generated query that equals a query of the history, or an earlier query of the same response, is
               irrelevant word by word, whatever the true next queries hold.
    separator  each occurrence of the separator is a span of class 0; other punctuation lies outside every span.
    sentence   1 when at least half of the response's words are relevant; 0 for a response without words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import snowballstemmer

from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, Labels
from tppo_fast.rewards.segment import admitted, check_separator, query_words, segment
from tppo_fast.words import normalise_query, stem


def classify_queries(
    history: Sequence[str],
    next_queries: Sequence[str],
    queries: Sequence[str],
    *,
    num_queries: int | None = None,
    language: str = "english",
) -> list[list[int]]:
    """The class of every word of every generated query, by the rules at the top of this file.

    Returns:
        One list per query, one class (1 irrelevant, 2 relevant) per word of ``query_words(query)``.
    """
    truth = _true_stems(tuple(next_queries), language)
    left = sum(truth, Counter())
    classes = []
    for query, fine in zip(queries, admitted(history, queries, num_queries), strict=True):
        stems = [stem(query[start:end], language) for start, end in query_words(query)]
        classes.append(_judge(stems, truth, left) if fine else [IRRELEVANT] * len(stems))
    return classes


@lru_cache(maxsize=1 << 12)
def _true_stems(next_queries: tuple[str, ...], language: str) -> list[Counter[str]]:
    """The stems of each distinct true query."""
    distinct = {normalise_query(query): query for query in next_queries}.values()
    return [Counter(stem(query[start:end], language) for start, end in query_words(query)) for query in distinct]


def _judge(stems: list[str], truth: list[Counter[str]], left: Counter[str]) -> list[int]:
    """Classes of one query's words, from left to right; relevant ones are taken out of ``left``."""
    here: Counter[str] = Counter()
    alive = truth  # the true queries that hold every relevant word so far
    classes = []
    for word in stems:
        holding = [true for true in alive if true[word] > here[word]] if left[word] > 0 else []
        if holding:
            alive = holding
            here[word] += 1
            left[word] -= 1
        classes.append(RELEVANT if holding else IRRELEVANT)
    return classes


@dataclass(frozen=True, slots=True, kw_only=True)
class LexicalLabeller:
    """A ``Labeller`` that needs no model.

    Raises:
        UserError: a blank separator, or a language that Snowball does not know.
    """

    separator: str = ", "
    """Text between queries; its visible part splits a response wherever it stands, as in ``words.queries_of``."""
    num_queries: int | None = None
    """Queries a response should hold; words of later ones are irrelevant. None sets no limit."""
    language: str = "english"
    """Snowball algorithm for the stems."""

    def __post_init__(self) -> None:
        check_separator(self.separator)
        if self.language not in snowballstemmer.algorithms():
            raise UserError(f"language = {self.language!r}: Snowball knows {', '.join(snowballstemmer.algorithms())}")

    def __call__(self, history: Sequence[str], next_queries: Sequence[str], response_text: str, /) -> Labels:
        parts = segment(response_text, self.separator)
        judged = classify_queries(
            history, next_queries, parts.texts, num_queries=self.num_queries, language=self.language
        )
        return parts.labels(judged, _sentence([kind for kinds in judged for kind in kinds]))


def _sentence(classes: list[int]) -> int:
    relevant, irrelevant = classes.count(RELEVANT), classes.count(IRRELEVANT)
    return int(relevant > 0 and relevant >= irrelevant)
