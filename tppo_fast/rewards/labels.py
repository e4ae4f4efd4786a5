"""What a labeller says about one response: a class for every word and one for the whole response."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tppo_fast.errors import UserError

SEPARATOR, IRRELEVANT, RELEVANT = 0, 1, 2
CLASS_NAMES = ("separator", "irrelevant", "relevant")
"""The stored classes of the token reward model (TPPO, section 3.2); only irrelevant and relevant are rewarded."""

Span = tuple[int, int]
"""(start, end) in characters, end exclusive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels of one response; arrays become lists of Python's own numbers.

    Raises:
        UserError: spans that are no pairs of whole numbers, empty, overlapping or unordered; an unknown class; unequal lengths.
    """

    spans: list[Span]
    """Character span of each word in the response text, in reading order, never empty, never overlapping."""
    classes: list[int]
    """One class per span: 0 separator, 1 irrelevant, 2 relevant. Text outside every span is class 0."""
    sentence: int
    """The whole response: 0 irrelevant, 1 relevant."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", _pairs(self.spans))
        object.__setattr__(self, "classes", _listed(self.classes))
        if len(self.spans) != len(self.classes):
            raise UserError(
                f"labels have {len(self.spans)} spans and {len(self.classes)} classes: give one class per span"
            )
        if not set(self.classes) <= {SEPARATOR, IRRELEVANT, RELEVANT}:
            bad = next(c for c in self.classes if c not in (SEPARATOR, IRRELEVANT, RELEVANT))
            raise UserError(f"labels hold class {bad!r}: use 0 (separator), 1 (irrelevant) or 2 (relevant)")
        if self.sentence not in (0, 1):
            raise UserError(f"labels hold sentence = {self.sentence!r}: use 0 (irrelevant) or 1 (relevant)")
        position = 0
        for start, end in self.spans:
            if not position <= start < end:
                raise UserError(f"labels hold span ({start}, {end}): spans must be non-empty, in order and not overlap")
            position = end


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _pairs(spans: Any) -> list[Span]:
    try:
        return [(operator.index(start), operator.index(end)) for start, end in spans]
    except (TypeError, ValueError):
        raise UserError(f"labels hold spans = {spans!r}: give a (start, end) of whole numbers for each word") from None


class Labeller(Protocol):
    """Judges each word of a response against what the user really asked next."""

    def __call__(self, history: Sequence[str], next_queries: Sequence[str], response_text: str, /) -> Labels:
        """The labels of ``response_text``; spans index its characters."""
        ...
