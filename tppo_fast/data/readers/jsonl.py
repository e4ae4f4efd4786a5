"""Any log as JSON Lines: {"user_id": ..., "query": ..., "time": "2006-03-01 07:17:12"} and optionally "click"."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tppo_fast.data.files import read_rows
from tppo_fast.data.readers.events import Event, Times
from tppo_fast.data.rows import show
from tppo_fast.errors import UserError


def read_jsonl(path: Path) -> Iterator[tuple[str, list[Event]]]:
    """(user, events) for each user, in the order of first appearance.

    Raises:
        UserError: a line that is no such object.
    """
    users: dict[str, list[Event]] = {}
    for user, event in read_rows(path, partial(_parse, Times()), "query", any_suffix=True):
        users.setdefault(user, []).append(event)
    yield from users.items()


def _parse(time_of: Times, row: object, where: str) -> tuple[str, Event]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {show(row)} is not an object: write user_id, query and time")
    for name in ("user_id", "query", "time"):
        if name not in row:
            raise UserError(f"{where}: {name} is missing: write user_id, query and time")
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: {name} = {show(row.get(name))} is not text: write it as a string in quotes")
    if not row["user_id"].strip():
        raise UserError(
            f"{where}: user_id = {show(row['user_id'])} is blank, and would make one user of many: fill it in"
        )
    click = row.get("click") or ""
    if not isinstance(click, str):
        raise UserError(f"{where}: click = {show(click)} is not text: write it as a string in quotes")
    event = Event(time=time_of(row["time"], where), query=sys.intern(row["query"]), click=sys.intern(click))
    return sys.intern(row["user_id"]), event
