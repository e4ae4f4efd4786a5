"""The lexical labeller: a word is relevant when the true next queries use it (TPPO's labels without a labelling LLM).

The rules, where the paper leaves them open:
    words      ``words.word_spans``; compared by Snowball stem of the NFKC-casefolded form.
    relevant   the stem occurs in the true next queries (each distinct query counted once).
    repetition must not pay: within one generated query a stem is relevant at most as often as the true query that uses
               it most often; over the response at most as often as all true queries together use it. Only relevant
               occurrences use up the allowance, so a wrong repetition takes nothing from a later right word.
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
    per_query, in_total = _allowance(tuple(next_queries), language)
    known = {normalise_query(query) for query in history}
    used: Counter[str] = Counter()
    classes = []
    for query in queries:
        form = normalise_query(query)
        stems = [stem(query[start:end], language) for start, end in query_words(query)]
        if form in known:
            classes.append([IRRELEVANT] * len(stems))
        else:
            classes.append(_spend(stems, per_query, in_total, used))
        known.add(form)
    return classes


def query_words(query: str) -> list[Span]:
    """Character spans of the words that have a normal form."""
    return [(start, end) for start, end in word_spans(query) if normalise_word(query[start:end])]


@lru_cache(maxsize=1 << 12)
def _allowance(next_queries: tuple[str, ...], language: str) -> tuple[Counter[str], Counter[str]]:
    """How often each stem may be relevant in one query, and in the whole response."""
    per_query: Counter[str] = Counter()
    in_total: Counter[str] = Counter()
    for query in {normalise_query(query): query for query in next_queries}.values():
        counts = Counter(stem(query[start:end], language) for start, end in query_words(query))
        per_query |= counts
        in_total += counts
    return per_query, in_total


def _spend(stems: list[str], per_query: Counter[str], in_total: Counter[str], used: Counter[str]) -> list[int]:
    here: Counter[str] = Counter()
    classes = []
    for word in stems:
        relevant = here[word] < per_query[word] and used[word] < in_total[word]
        if relevant:
            here[word] += 1
            used[word] += 1
        classes.append(RELEVANT if relevant else IRRELEVANT)
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
