"""Sim4IA (SIGIR 2025): CSV with session_id, query and date; the last query of a session is the one to predict.

Use ``targets = 1``, and a gap long enough that a given session stays whole.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from tppo_fast.data.files import read_lines
from tppo_fast.data.readers.events import Event, Times
from tppo_fast.errors import UserError


def read_sim4ia(path: Path) -> Iterator[tuple[str, list[Event]]]:
    """(session, events) for each session, in file order; sessions are the only users that this log has.

    Raises:
        UserError: a column is missing, a bad time, or a field that is too long for a CSV file.
    """
    rows = csv.DictReader(line for line, _ in read_lines(path))
    time_of = Times()
    sessions: dict[str, list[Event]] = {}
    try:
        if missing := {"session_id", "query", "date"} - set(rows.fieldnames or ()):
            raise UserError(f"{str(path)!r}: there is no column {sorted(missing)[0]!r}; give a Sim4IA task A file")
        for row in rows:
            where = f"{str(path)!r} line {rows.line_num}"
            event = Event(time=time_of(row["date"] or "", where), query=row["query"] or "")
            sessions.setdefault((row["session_id"] or "").strip(), []).append(event)
    except csv.Error as error:
        raise UserError(f"{str(path)!r} after line {rows.line_num}: {error}; give a Sim4IA task A file") from None
    yield from sessions.items()
