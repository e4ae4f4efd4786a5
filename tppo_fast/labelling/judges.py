"""What every labeller looks like to the labelling run, and how its labels are told from another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tppo_fast.rewards.labels import Labeller, Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One response to judge; equal items are judged once."""

    history: tuple[str, ...]
    """What the user searched before, oldest first; every entry of the history where nothing was searched."""
    next_queries: tuple[str, ...]
    """What the user really asked next."""
    response: str
    """The response's text."""

    def key(self, labeller: str) -> str:
        """Names this item as judged by one labeller, by content."""
        return digest([labeller, self.history, self.next_queries, self.response])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """An item that the labeller could not judge: set aside, never labelled silently."""

    reason: str
    """Why, in one sentence."""
    answer: str
    """The last answer, for a person to look at."""


class Judge(Protocol):
    """A labeller as the labelling run uses it: batched, with an identity."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides its labels, as JSON: ``labeller`` (its kind) first, ``causal`` among the rest."""
        ...

    @property
    def chunk(self) -> int:
        """Items in one call. Calls are always made of the same items, so that batching cannot change a label."""
        ...

    def judge(self, items: Sequence[Item]) -> list[Labels | Rejected]:
        """The labels of each item.

        Raises:
            LabellingFailed: the items could not be judged now, and may be later.
        """
        ...

    def close(self) -> None:
        """Give back connections; safe to call twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OneByOne:
    """A ``Judge`` made of any plain ``Labeller``."""

    labeller: Labeller
    """Judges one response."""
    identity: Mapping[str, Any]
    """See ``Judge``."""
    chunk: int = 256
    """See ``Judge``."""

    def judge(self, items: Sequence[Item]) -> list[Labels | Rejected]:
        return [self.labeller(item.history, item.next_queries, item.response) for item in items]

    def close(self) -> None:
        """There is nothing to give back."""


def labeller_id(identity: Mapping[str, Any]) -> str:
    """Short name of a labeller: its kind and a hash of its whole identity."""
    return f"{identity['labeller']}/{digest(identity)[:12]}"


def digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
