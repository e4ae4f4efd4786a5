"""Query logs of others -> sessions of our schema: AOL-style TSV, TREC Session track XML, Sim4IA CSV, any JSON Lines.

Privacy. A query log is personal data even without names: people search for themselves, their addresses, illnesses, relatives.
The AOL logs of 2006 were released by accident and withdrawn, and their users were re-identified. Nothing of any log ships
here; bring a copy that you may lawfully use, keep what you convert as private as the original, and do not publish a model
trained on it without thought: it can repeat rare queries. ``scrub`` lowers the risk and does not end it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tppo_fast.data.readers.aol import read_aol
from tppo_fast.data.readers.events import Rules, sessions_of
from tppo_fast.data.readers.jsonl import read_jsonl
from tppo_fast.data.readers.scrub import Scrubber, fit, pseudonyms
from tppo_fast.data.readers.sim4ia import read_sim4ia
from tppo_fast.data.readers.trec import read_trec
from tppo_fast.data.rows import Session
from tppo_fast.errors import UserError

__all__ = ["READERS", "Rules", "convert"]

READERS: dict[str, Callable] = {"aol": read_aol, "trec": read_trec, "sim4ia": read_sim4ia, "jsonl": read_jsonl}
"""Format -> path -> (user, events) pairs; a user has several pairs where the log gives sessions."""


def convert(
    path: Path, kind: str, rules: Rules, *, min_users: int | None, key: bytes
) -> tuple[list[Session], Counter[str]]:
    """Sessions of a log, and how much each rule dropped. A log of N lines takes about 200 N bytes; a bad line ends it.

    Args:
        path: the log.
        kind: a key of ``READERS``.
        rules: how events become sessions.
        min_users: scrub, and drop queries with a word that fewer users typed and clicks on sites that fewer users clicked;
            None leaves the texts as they are.
        key: turns user ids into pseudonyms; a new one each time cannot be traced back, the same one gives the same.

    Raises:
        UserError: an unreadable file, a bad row, or nothing left.
    """
    users = list(READERS[kind](path))
    if not any(events for _, events in users):
        raise UserError(f"{str(path)!r} holds no query: give a log with at least one")
    dropped: Counter[str] = Counter()
    scrubber: Scrubber | None = None if min_users is None else fit(users, min_users)
    name = pseudonyms(key)
    sessions: list[Session] = []
    users.reverse()
    while users:
        user, events = users.pop()  # a user's events are forgotten as the sessions are made
        kept = events if scrubber is None else scrubber.clean(events, dropped)
        sessions += sessions_of(name(user), kept, rules, dropped)
    if not sessions:
        said = ", ".join(f"{count} {why}" for why, count in dropped.items())
        raise UserError(f"{str(path)!r}: no session is left ({said}); loosen the rules")
    return sessions, dropped
