"""Queries of a response and words of a query: where they stand, normal form, stem. Any script, by Unicode categories alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import snowballstemmer

Span = tuple[int, int]
_T = TypeVar("_T")

_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}\N{FULLWIDTH APOSTROPHE}"
_HAN = ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_SKIN_TONES = (0x1F3FB, 0x1F3FF)
_BRAILLE_BLANK = 0x2800  # a symbol by its category
_IGNORABLE = (  # Unicode's Default_Ignorable_Code_Point: nothing is shown for them, so that they tell no two words apart
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F),
    (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip


class _Table(dict[int, _T]):
    """Code point -> what ``of`` says about it, asked once: for ``str.translate``."""

    def __init__(self, of: Callable[[int], _T]) -> None:
        self._of = of

    def __missing__(self, code: int) -> _T:
        found = self[code] = self._of(code)
        return found


def _within(code: int, ranges: tuple[Span, ...]) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _kind(code: int) -> str:
    """One letter: w letter or digit, i ideograph, m mark, s symbol, ' apostrophe, blank the rest."""
    character = chr(code)
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf" or _within(code, _IGNORABLE):
        return "m"  # belongs to the character before it: accents, vowel signs, joiners
    if character in _APOSTROPHES:
        return "'"
    if _within(code, _HAN):
        return "i"
    if category[0] in "LN":
        return "w"
    if (category == "So" and code != _BRAILLE_BLANK) or _SKIN_TONES[0] <= code <= _SKIN_TONES[1]:
        return "s"  # an emoji is a word, otherwise a response of emoji would cost nothing
    return " "


def _plain(code: int) -> str | int | None:
    """The character for comparisons: None where it shows nothing, one apostrophe for all, a space between words."""
    if unicodedata.category(chr(code)) == "Cf" or _within(code, _IGNORABLE):
        return None
    kind = _kind(code)
    return kind if kind in "' " else code


_KINDS = _Table(_kind)
_PLAIN = _Table(_plain)
_WORD = re.compile(r"w[wm]*(?:'w[wm]*)*|im*|s[sm]*")


def word_spans(text: str) -> list[Span]:
    """Character spans of the words of ``text``, in reading order.

    A word is a run of letters and digits with their marks and inner apostrophes; one Han ideograph (Han is written
    without spaces); or a run of symbols such as an emoji sequence. Punctuation and space separate words; characters that
    show nothing do not.
    """
    kinds = text.translate(_KINDS)  # one letter per character, so offsets stay those of the text
    return [match.span() for match in _WORD.finditer(kinds)]


@lru_cache(maxsize=1 << 16)
def _folded(text: str) -> str:
    """The words of the text's NFKC_Casefold form (Unicode), joined by one space, with plain apostrophes."""
    folded = text.casefold()
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", text.translate(_PLAIN)).casefold()
        folded = unicodedata.normalize("NFKC", folded).translate(_PLAIN)  # again: casefolding writes apostrophes
    return " ".join([folded[start:end] for start, end in word_spans(folded)])


def normalise_word(word: str) -> str:
    """The word's normal form: NFKC, casefold, apostrophes dropped (women's -> womens). May be empty."""
    return _folded(word).replace("'", "").replace(" ", "")


@lru_cache(maxsize=1 << 14)
def normalise_query(query: str) -> str:
    """The query's normal form: its words' normal forms joined by one space. Equal normal form = same query."""
    return _folded(query).replace("'", "")


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
    return _stemmer(language).stemWord(_folded(word).replace(" ", "")).replace("'", "")
