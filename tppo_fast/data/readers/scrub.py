"""Lower the risk that a log names people: drop queries with identifiers, drop what few users typed, rename users.

A whole query is dropped, never masked: what stands around a name often names the person as well.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from urllib.parse import urlsplit

from tppo_fast.data.readers.events import Event
from tppo_fast.words import normalise_query

PATTERNS: dict[str, re.Pattern[str]] = {
    "an e-mail address": re.compile(r"\S+\s?@\s?\S+|\b(at|@)\s+(gmail|yahoo|hotmail|aol|outlook)\b", re.IGNORECASE),
    "a phone number": re.compile(r"(?<!\d)(\+?\d{1,3}[ .\-]?)?(\(\d{2,4}\)|\d{2,4})[ .\-]\d{3,4}[ .\-]?\d{3,4}(?!\d)"),
    "a social security number": re.compile(r"(?<!\d)\d{3}[ \-]\d{2}[ \-]\d{4}(?!\d)"),
    "a long number": re.compile(r"\d(?:[ \-]?\d){5,}"),
    "a street address": re.compile(
        r"\b\d{1,5}\s+(\w+\s+){1,3}(st|street|ave|avenue|rd|road|dr|drive|ln|lane|blvd|court|ct|way)\b", re.IGNORECASE
    ),
}
"""Why a query is dropped -> what in it is found. Six digits are a long number, with spaces or hyphens in them as well."""
_YEARS = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")
"""They stay, one after another as well: no digits of a long number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubber:
    """Knows what at least ``min_users`` users typed and clicked."""

    common: frozenset[str]
    """Normal forms of words."""
    hosts: frozenset[str]
    """Clicked hosts."""

    def reason(self, query: str) -> str | None:
        """Why the query must go, or None."""
        for why, pattern in PATTERNS.items():
            if pattern.search(_YEARS.sub("year", query) if why == "a long number" else query):
                return why
        rare = any(word not in self.common for word in normalise_query(query).split())
        return "a word of few users" if rare else None

    def clean(self, events: Sequence[Event], dropped: Counter[str]) -> list[Event]:
        """The events whose query may stay; of a click only the host is kept, and only one that many users clicked."""
        kept = []
        for event in events:
            if why := self.reason(event.query):
                dropped[f"queries with {why}"] += 1
                continue
            host = _host(event.click)
            if host and host not in self.hosts:
                dropped["clicks on a site of few users"] += 1
                host = ""
            kept.append(replace(event, click=host))
        return kept


def fit(users: Sequence[tuple[str, Sequence[Event]]], min_users: int) -> Scrubber:
    """Count for each word and host how many USERS have it: what one person typed a hundred times is still one user's.

    A user may stand in ``users`` several times, once for each session.
    """
    words: Counter[str] = Counter()
    hosts: Counter[str] = Counter()
    for _, parts in groupby(sorted(users, key=_user), key=_user):  # one user's words in memory at a time
        events = [event for _, part in parts for event in part]
        words.update({word for event in events for word in normalise_query(event.query).split()})
        hosts.update({host for event in events if (host := _host(event.click))})
    common, known = (
        frozenset(name for name, count in counts.items() if count >= min_users) for counts in (words, hosts)
    )
    return Scrubber(common=common, hosts=known)


def _user(pair: tuple[str, Sequence[Event]]) -> str:
    return pair[0]


def pseudonyms(key: bytes) -> Callable[[str], str]:
    """User id -> pseudonym: a keyed hash, which nobody without the key can redo."""
    return lambda user: "u" + hashlib.blake2b(user.encode("utf-8", "surrogatepass"), key=key, digest_size=8).hexdigest()


def _host(click: str) -> str:
    if not click:
        return ""
    try:
        return urlsplit(click if "//" in click else f"//{click}").hostname or ""
    except ValueError:
        return ""
