"""AOL-style logs: tab-separated AnonID, Query, QueryTime, ItemRank, ClickURL; "-" is an empty query. You supply the file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tppo_fast.data.readers.events import Event, open_text, parse_time
from tppo_fast.errors import UserError

HEADER = ["AnonID", "Query", "QueryTime", "ItemRank", "ClickURL"]


def read_aol(path: Path) -> Iterator[tuple[str, list[Event]]]:
    """(user, events) for each user; a user's lines may stand anywhere in the file.

    Raises:
        UserError: a line without three to five columns, or a bad time.
    """
    rows: list[tuple[str, Event]] = []
    for number, line in enumerate(open_text(path).split("\n"), 1):
        columns = line.rstrip("\r").split("\t")
        if columns == HEADER or not line.strip():
            continue
        where = f"{str(path)!r} line {number}"
        if not 3 <= len(columns) <= 5 or not columns[0].strip():
            raise UserError(
                f"{where}: {len(columns)} tab-separated columns: give an AOL log, with a tab between {', '.join(HEADER)}"
            )
        user, query, time, *rest = columns
        click = rest[1].strip() if len(rest) > 1 else ""
        query = "" if query.strip() == "-" else query
        rows.append((user.strip(), Event(time=parse_time(time, where), query=query, click=click)))
    rows.sort(key=lambda row: row[0])  # stable: the log's order within a user
    for user, group in groupby(rows, key=lambda row: row[0]):
        yield user, [event for _, event in group]
