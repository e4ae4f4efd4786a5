"""Where the words of a response stand: the one segmentation that every labeller shares, so that labels compare by position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import SEPARATOR, Labels, Span
from tppo_fast.words import normalise_query, normalise_word, word_spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """A response cut into queries and words; every span indexes the response's characters."""

    text: str
    """The response."""
    separators: list[Span]
    """Each occurrence of the separator's visible part."""
    queries: list[Span]
    """What stands between the separators, empty pieces included."""
    words: list[list[Span]]
    """The words of each query, in reading order."""

    @property
    def texts(self) -> list[str]:
        """The text of each query."""
        return [self.text[start:end] for start, end in self.queries]

    @property
    def flat(self) -> list[str]:
        """Every word of the response, in reading order."""
        return [self.text[start:end] for spans in self.words for start, end in spans]

    def labels(self, classes: Sequence[Sequence[int]], sentence: int) -> Labels:
        """Labels from one class per word of each query; separators are class 0."""
        judged = [
            pair for spans, kinds in zip(self.words, classes, strict=True) for pair in zip(spans, kinds, strict=True)
        ]
        ordered = sorted([*judged, *((span, SEPARATOR) for span in self.separators)])
        return Labels(spans=[span for span, _ in ordered], classes=[kind for _, kind in ordered], sentence=sentence)


def segment(text: str, separator: str) -> Segments:
    """Cut ``text`` at the visible part of ``separator``, wherever it stands, as ``words.queries_of`` does.

    Raises:
        UserError: a blank separator.
    """
    check_separator(separator)
    breaks = [match.span() for match in re.finditer(re.escape(separator.strip()), text)]
    starts = [0, *(end for _, end in breaks)]
    ends = [*(start for start, _ in breaks), len(text)]
    queries = list(zip(starts, ends, strict=True))
    words = [[(s + start, e + start) for s, e in query_words(text[start:end])] for start, end in queries]
    return Segments(text=text, separators=breaks, queries=queries, words=words)


def repetitions(history: Sequence[str], queries: Sequence[str]) -> list[bool]:
    """Whether each query of a response repeats one of the history, or an earlier one of the response."""
    known, found = {normalise_query(query) for query in history}, []
    for form in map(normalise_query, queries):
        found.append(bool(form) and form in known)
        known.add(form)
    return found


def admitted(history: Sequence[str], queries: Sequence[str], num_queries: int | None) -> list[bool]:
    """Whether words of each query can be relevant: it repeats nothing, and is among the first ``num_queries``.

    An empty piece is no query, as in ``words.queries_of``.
    """
    places = accumulate(bool(query.strip()) for query in queries)
    repeated = repetitions(history, queries)
    return [
        not again and (num_queries is None or place <= num_queries)
        for again, place in zip(repeated, places, strict=True)
    ]


def check_separator(separator: str) -> None:
    """Raise UserError for one without a visible part."""
    if not separator.strip():
        raise UserError(f"separator = {separator!r}: give at least one character that is not a space")


def query_words(query: str) -> list[Span]:
    """Character spans of the words that have a normal form."""
    return [(start, end) for start, end in word_spans(query) if normalise_word(query[start:end])]
