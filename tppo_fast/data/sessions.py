"""Search sessions on disk: read, validated with line numbers, written atomically, split by user.

Schema, one JSON object per line of a ``.jsonl`` file (UTF-8), or the same columns in a ``.parquet`` file:

    {"user_id": "u17",
     "history": {"search": ["lisbon", "lisbon hotels"], "click": ["hotel-aurora.example"]},
     "next_queries": ["lisbon hotels old town", "lisbon tram map"],
     "relevant_queries": ["lisbon hotels old town", "lisbon tram map", "lisbon metro map"]}

- ``user_id``: text. One user may have many rows; all of them fall on the same side of a split.
- ``history``: kind of event -> list of texts, OLDEST FIRST. Any kind may be used (search, click, purchase, visit, ...);
  a kind may be empty or null, all of them may not. In Parquet this is a struct of lists, null where a kind is absent.
- ``next_queries``: list of texts, what the user asked next, in order. At least one.
- ``relevant_queries``: optional list of texts, every query known to be relevant; absent, ``next_queries`` stand for it.

No other field is allowed and no text may be blank. Blank lines are skipped, a UTF-8 byte order mark is tolerated, and
of a key that occurs twice in one object the last value counts, as in every JSON reader.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from tppo_fast.data.files import read_rows, write_rows
from tppo_fast.data.rows import Session, parse_history, parse_row, to_row
from tppo_fast.errors import UserError

__all__ = ["Session", "of_many_users", "read_histories", "read_sessions", "split_by_user", "write_sessions"]


class _OfUser(Protocol):
    @property
    def user_id(self) -> str: ...


T = TypeVar("T", bound=_OfUser)


def read_sessions(path: str | os.PathLike[str]) -> list[Session]:
    """Every session of a ``.jsonl`` or ``.parquet`` file, in file order.

    Raises:
        UserError: the file cannot be read or is empty, or a row is no session; the message is one line and names file,
            line (Parquet: row, counted from 1), field, value and remedy.
    """
    return read_rows(Path(path), parse_row, "session")


def read_histories(path: str | os.PathLike[str]) -> list[Session]:
    """``read_sessions`` of a file whose rows may lack ``next_queries``; there are none in the sessions returned."""
    return read_rows(Path(path), parse_history, "session")


def write_sessions(path: str | os.PathLike[str], sessions: Iterable[Session]) -> None:
    """Write a ``.jsonl`` or ``.parquet`` file that ``read_sessions`` gives back unchanged.

    The file appears complete or not at all: it is written under a temporary name beside ``path``, flushed to disk and
    renamed.

    Raises:
        UserError: wrong suffix, unwritable folder, no session, or a session that ``read_sessions`` would refuse.
    """
    rows = [to_row(session) for session in sessions]
    for number, row in enumerate(rows, 1):
        parse_row(row, f"session {number}")  # what is written can always be read
    write_rows(Path(path), rows, "session")


def split_by_user(sessions: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Hold out about ``fraction`` of the USERS; returns (train, eval), each in the order given.

    A user is held out when a hash of seed and user_id, read as a number in [0, 1), is below ``fraction``: the same on
    every machine, and a user keeps the side when sessions are added. Where that leaves one side empty, the one user
    nearest to the threshold changes sides.

    Raises:
        UserError: fraction outside (0, 1), fewer than two users, or what was left over when another file was split.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(f"eval fraction = {fraction}: give a share of users above 0 and below 1")
    place = {session.user_id: _unit_hash(session.user_id, seed) for session in sessions}
    if len(place) < 2:
        raise UserError(f"a split by user needs at least 2 users, the data has {len(place)}: give a separate eval file")
    ranked = sorted(place, key=lambda user: (place[user], user))
    held_out = sum(value < fraction for value in place.values())
    if not held_out and fraction * len(place) >= 6:  # by chance in 1 of 400 files at most
        raise UserError(
            f"data.split_seed = {seed}: none of {len(place)} users is in the {fraction:.0%} that it holds out: probably this is "
            "the training side of an earlier split; give its held-out side as data.eval, or another data.split_seed"
        )
    chosen = set(ranked[: min(max(held_out, 1), len(ranked) - 1)])
    train = [session for session in sessions if session.user_id not in chosen]
    return train, [session for session in sessions if session.user_id in chosen]


def of_many_users(sessions: Sequence[T]) -> list[T]:
    """The same sessions in an order whose first n are of as many users as n can be: one of each user, a second one of each, ...

    Users come in the order of a hash of their names, which is the same on every machine.
    """
    seen = Counter[str]()
    places = []
    for place, session in enumerate(sessions):
        places.append((seen[session.user_id], _unit_hash(session.user_id, 0), place))
        seen[session.user_id] += 1
    return [sessions[place] for *_, place in sorted(places)]


def _unit_hash(user_id: str, seed: int) -> float:
    key = f"{seed}:{user_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "big") / 2**48
