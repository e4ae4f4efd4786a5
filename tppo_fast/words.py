"""Queries of a response and words of a query: where they stand, normal form, stem. Any script, by Unicode categories alone."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

import snowballstemmer

Span = tuple[int, int]

_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}\N{FULLWIDTH APOSTROPHE}"
_HAN = ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_SKIN_TONES = (0x1F3FB, 0x1F3FF)
_ZERO_WIDTH_SPACE = 0x200B


class _Kinds(dict[int, str]):
    """Code point -> one letter: w letter or digit, i ideograph, m mark, s symbol, ' apostrophe, blank the rest."""

    def __missing__(self, code: int) -> str:
        kind = self[code] = _kind(code)
        return kind


def _kind(code: int) -> str:
    character = chr(code)
    category = unicodedata.category(character)
    if character in _APOSTROPHES:
        return "'"
    if any(low <= code <= high for low, high in _HAN):
        return "i"
    if category[0] in "LN":
        return "w"
    if category[0] == "M" or (category == "Cf" and code != _ZERO_WIDTH_SPACE):
        return "m"  # belongs to the character before it: accents, vowel signs, joiners
    if category == "So" or _SKIN_TONES[0] <= code <= _SKIN_TONES[1]:
        return "s"  # an emoji is a word, otherwise a response of emoji would cost nothing
    return " "


_KINDS = _Kinds()
_WORD = re.compile(r"w[wm]*(?:'w[wm]*)*|im*|s[sm]*")


def word_spans(text: str) -> list[Span]:
    """Character spans of the words of ``text``, in reading order.

    A word is a run of letters and digits with their marks and inner apostrophes; one Han ideograph (Han is written
    without spaces); or a run of symbols such as an emoji sequence. Punctuation and space separate words.
    """
    kinds = text.translate(_KINDS)  # one letter per character, so offsets stay those of the text
    return [match.span() for match in _WORD.finditer(kinds)]


@lru_cache(maxsize=1 << 16)
def _folded(word: str) -> str:
    """NFKC, casefolded, reduced to word characters and plain apostrophes."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    folded = unicodedata.normalize("NFKC", folded)
    kinds = folded.translate(_KINDS)
    kept = ("'" if kind == "'" else c for c, kind in zip(folded, kinds, strict=True) if kind != " ")
    return "".join(c for c in kept if unicodedata.category(c) != "Cf")


def normalise_word(word: str) -> str:
    """The word's normal form: NFKC, casefold, apostrophes dropped (women's -> womens). May be empty."""
    return _folded(word).replace("'", "")


@lru_cache(maxsize=1 << 14)
def normalise_query(query: str) -> str:
    """The query's normal form: its words' normal forms joined by one space. Equal normal form = same query."""
    forms = (normalise_word(query[start:end]) for start, end in word_spans(query))
    return " ".join(form for form in forms if form)


def queries_of(response: str, separator: str) -> list[str]:
    """The queries of a response: split at the visible part of ``separator``, single spaces, empty ones dropped."""
    parts = (" ".join(part.split()) for part in response.split(separator.strip()))
    return [part for part in parts if part]


@lru_cache(maxsize=8)
def _stemmer(language: str) -> Any:
    return snowballstemmer.stemmer(language)


@lru_cache(maxsize=1 << 16)
def stem(word: str, language: str = "english") -> str:
    """The Snowball stem of the word's normal form (recipes -> recip, women's -> women)."""
    return _stemmer(language).stemWord(_folded(word)).replace("'", "")
