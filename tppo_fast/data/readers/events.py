"""What every log is made of, and how a user's events become sessions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tppo_fast.data.rows import Session, show
from tppo_fast.errors import UserError
from tppo_fast.words import normalise_query


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a log."""

    time: datetime
    """When, without a zone: UTC where the log's times have one."""
    query: str
    """What was searched; "" where the log has none."""
    click: str = ""
    """What was clicked, or ""."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How events become sessions. Every rule that drops something is counted."""

    gap: timedelta = timedelta(minutes=30)
    """A longer pause starts a new session."""
    targets: int = 3
    """The newest queries of a session, which become ``next_queries``."""
    min_history: int = 1
    """Fewest queries before them."""
    max_characters: int = 100
    """Longer queries are dropped: pasted text."""
    navigational: bool = False
    """Keep queries that are an address (www., .com, ...): they name a site and not a need."""


_ADDRESS = re.compile(
    r"\bhttps?:|\bwww\.|(?<![\w.])(?!(?:asp|vb|ado)\.net\b)(?:[\w-]+\.)+(?:com|net|org|edu|gov)\b", re.IGNORECASE
)
"""A site's name anywhere in a query; "asp.net" and ".net framework" are none."""


def sessions_of(user: str, events: Sequence[Event], rules: Rules, dropped: Counter[str]) -> Iterator[Session]:
    """The sessions of one user; ``dropped`` counts what fell out, by reason."""
    for part in split(sorted(events, key=lambda event: event.time), rules.gap):
        queries, clicks, last = [], [], ""
        for event in part:
            form = normalise_query(event.query)
            if not form:
                dropped["queries without a word"] += 1
                continue
            if len(event.query) > rules.max_characters:
                dropped["queries that are too long"] += 1
                continue
            if not rules.navigational and _ADDRESS.search(event.query):
                dropped["queries that are an address"] += 1
                continue
            if form != last:  # a log repeats the query for every click and page
                queries.append(" ".join(event.query.split()))
            if event.click:
                clicks.append((len(queries), event.click))
            last = form
        if len(queries) < rules.targets + rules.min_history:
            dropped["sessions that are too short"] += 1
            continue
        known = len(queries) - rules.targets
        seen = [click for place, click in clicks if place <= known]  # a click on a target would tell it
        history = {"search": tuple(queries[:known])} | ({"click": tuple(seen)} if seen else {})
        yield Session(user_id=user, history=history, next_queries=tuple(queries[known:]))


def split(events: Sequence[Event], gap: timedelta) -> Iterator[list[Event]]:
    """Runs of events without a pause longer than ``gap``."""
    part: list[Event] = []
    for event in events:
        if part and event.time - part[-1].time > gap:
            yield part
            part = []
        part.append(event)
    if part:
        yield part


class Times:
    """Reads the times of one log: ISO dates and times, all with a zone, which become UTC, or all without."""

    def __init__(self) -> None:
        self._zoned: bool | None = None
        """Whether the first time has a zone."""

    def __call__(self, text: str, where: str) -> datetime:
        """The time that stands at ``where``, without its zone.

        Raises:
            UserError: it is none, or has a zone where the first one has none, or the other way round.
        """
        try:
            time = datetime.fromisoformat(text.strip())
            zoned = time.tzinfo is not None
            time = time.astimezone(UTC).replace(tzinfo=None) if zoned else time
        except (ValueError, OverflowError):  # OverflowError: its UTC lies outside the years 1 to 9999
            raise UserError(f"{where}: time {show(text)} is not a date and time such as 2006-03-01 07:17:12") from None
        if self._zoned is None:
            self._zoned = zoned
        if zoned != self._zoned:
            has, had = ("a zone", "none") if zoned else ("no zone", "one")
            raise UserError(
                f"{where}: time {show(text)} has {has}, and the times before it have {had}: give all or none a zone"
            )
        return time
