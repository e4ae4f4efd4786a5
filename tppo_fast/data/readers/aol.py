"""AOL-style logs: tab-separated AnonID, Query, QueryTime, ItemRank, ClickURL; "-" is an empty query. You supply the file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tppo_fast.data.files import read_lines
from tppo_fast.data.readers.events import Event, Times
from tppo_fast.errors import UserError

HEADER = ["AnonID", "Query", "QueryTime", "ItemRank", "ClickURL"]


def read_aol(path: Path) -> Iterator[tuple[str, list[Event]]]:
    """(user, events) for each user, in the order of first appearance; a user's lines may stand anywhere in the file.

    Raises:
        UserError: a line without three to five columns, or a bad time.
    """
    users: dict[str, list[Event]] = {}
    time_of = Times()
    for line, where in read_lines(path):
        columns = line.rstrip("\r\n").split("\t")
        if columns == HEADER or not line.strip():
            continue
        if not 3 <= len(columns) <= 5 or not columns[0].strip():
            raise UserError(
                f"{where}: {len(columns)} tab-separated columns: give an AOL log, with a tab between {', '.join(HEADER)}"
            )
        user, query, time, *rest = columns
        click = rest[1].strip() if len(rest) > 1 else ""
        query = "" if query.strip() == "-" else query
        event = Event(time=time_of(time, where), query=sys.intern(query), click=sys.intern(click))
        users.setdefault(user.strip(), []).append(event)
    yield from users.items()
