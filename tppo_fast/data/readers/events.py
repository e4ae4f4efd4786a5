"""What every log is made of, and how a user's events become sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from tppo_fast.data.rows import Session
from tppo_fast.errors import UserError
from tppo_fast.words import normalise_query


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a log."""

    time: datetime
    """When."""
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


_ADDRESS = ("http", "www.", ".com", ".net", ".org", ".edu", ".gov")


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
            if not rules.navigational and any(mark in event.query.lower() for mark in _ADDRESS):
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


def parse_time(text: str, where: str) -> datetime:
    """An ISO date and time, without a zone.

    Raises:
        UserError: it is none.
    """
    try:
        return datetime.fromisoformat(text.strip()).replace(tzinfo=None)
    except ValueError:
        raise UserError(f"{where}: time {text!r} is not a date and time such as 2006-03-01 07:17:12") from None


def open_text(path: Path) -> str:
    """The text of a file, ``.gz`` unpacked.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    import gzip
    import zlib

    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.object[error.start : error.start + 1]
        raise UserError(
            f"{str(path)!r}: byte {bad!r} at position {error.start} is not UTF-8: save the file as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "not a whole gzip file"
        raise UserError(f"{str(path)!r} cannot be read ({reason}): give a readable file") from None
