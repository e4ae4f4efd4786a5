"""The lexical labeller: a word is relevant when the true next queries use it (TPPO's labels without a labelling LLM).

The rules, where the paper leaves them open:
    words      ``words.word_spans``; compared by Snowball stem of the NFKC-casefolded form.
    matching   each generated query is matched with at most one true query and the other way round, the pairs that share
               most stems first: words are judged as part of the query they stand in, and nothing counts twice.
    relevant   the stem occurs in the matched true query, at most as often as there.
    novelty    a generated query that equals a query of the history, or an earlier query of the same response, is
               irrelevant word by word, whatever the true next queries hold.
    separator  each occurrence of the separator is a span of class 0; other punctuation lies outside every span.
    sentence   1 when at least half of the response's words are relevant; 0 for a response without words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import snowballstemmer

from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, SEPARATOR, Labels, Span
from tppo_fast.words import normalise_query, normalise_word, stem, word_spans


def classify_queries(
    history: Sequence[str], next_queries: Sequence[str], queries: Sequence[str], language: str = "english"
) -> list[list[int]]:
    """The class of every word of every generated query, by the rules at the top of this file.

    Returns:
        One list per query, one class (1 irrelevant, 2 relevant) per word of ``query_words(query)``.
    """
    known = {normalise_query(query) for query in history}
    stems = [[stem(query[start:end], language) for start, end in query_words(query)] for query in queries]
    fresh: list[int] = []
    for index, query in enumerate(queries):
        form = normalise_query(query)
        if form not in known:
            fresh.append(index)
        known.add(form)
    truth = _true_stems(tuple(next_queries), language)
    matched = _match({index: Counter(stems[index]) for index in fresh}, truth)
    return [_spend(words, Counter(matched.get(index, ()))) for index, words in enumerate(stems)]


def query_words(query: str) -> list[Span]:
    """Character spans of the words that have a normal form."""
    return [(start, end) for start, end in word_spans(query) if normalise_word(query[start:end])]


@lru_cache(maxsize=1 << 12)
def _true_stems(next_queries: tuple[str, ...], language: str) -> list[Counter[str]]:
    """The stems of each distinct true query."""
    distinct = {normalise_query(query): query for query in next_queries}.values()
    return [Counter(stem(query[start:end], language) for start, end in query_words(query)) for query in distinct]


def _match(generated: dict[int, Counter[str]], truth: list[Counter[str]]) -> dict[int, Counter[str]]:
    """Generated query -> its true query: greedily by shared stems, ties to the shorter and then the earlier true query."""
    shared = [((stems & true).total(), -true.total(), -i, -j) for i, stems in generated.items() for j, true in enumerate(truth)]
    matched: dict[int, Counter[str]] = {}
    taken: set[int] = set()
    for overlap, _, i, j in sorted(shared, reverse=True):
        if overlap and -i not in matched and -j not in taken:
            matched[-i] = truth[-j]
            taken.add(-j)
    return matched


def _spend(stems: list[str], allowance: Counter[str]) -> list[int]:
    classes = []
    for word in stems:
        classes.append(RELEVANT if allowance[word] > 0 else IRRELEVANT)
        allowance[word] -= 1
    return classes


@dataclass(frozen=True, slots=True, kw_only=True)
class LexicalLabeller:
    """A ``Labeller`` that needs no model.

    Raises:
        UserError: a blank separator, or a language that Snowball does not know.
    """

    separator: str = ", "
    """Text between queries; its visible part splits a response wherever it stands, as in ``PromptBuilder.parse``."""
    language: str = "english"
    """Snowball algorithm for the stems."""

    def __post_init__(self) -> None:
        if not self.separator.strip():
            raise UserError(f"separator = {self.separator!r}: give at least one character that is not a space")
        if self.language not in snowballstemmer.algorithms():
            raise UserError(f"language = {self.language!r}: Snowball knows {', '.join(snowballstemmer.algorithms())}")

    def __call__(self, history: Sequence[str], next_queries: Sequence[str], response_text: str, /) -> Labels:
        breaks = [match.span() for match in re.finditer(re.escape(self.separator.strip()), response_text)]
        starts = [0, *(end for _, end in breaks)]
        ends = [*(start for start, _ in breaks), len(response_text)]
        queries = [response_text[start:end] for start, end in zip(starts, ends, strict=True)]
        labelled = [(span, SEPARATOR) for span in breaks]
        for offset, query, classes in zip(
            starts, queries, classify_queries(history, next_queries, queries, self.language), strict=True
        ):
            spans = query_words(query)
            labelled += [((s + offset, e + offset), c) for (s, e), c in zip(spans, classes, strict=True)]
        labelled.sort()
        classes = [c for _, c in labelled]
        return Labels(spans=[span for span, _ in labelled], classes=classes, sentence=_sentence(classes))


def _sentence(classes: list[int]) -> int:
    relevant, irrelevant = classes.count(RELEVANT), classes.count(IRRELEVANT)
    return int(relevant > 0 and relevant >= irrelevant)
