"""TREC Session track (2011 to 2014): XML of sessions, each of interactions with a query and clicks, then the current query.

The current query is the one to predict: use ``targets = 1``, and a gap long enough that a given session stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tppo_fast.data.files import read_lines
from tppo_fast.data.readers.events import Event
from tppo_fast.errors import UserError


def read_trec(path: Path) -> Iterator[tuple[str, list[Event]]]:
    """(user, events of one session) for each session; the user is the session where the track names none.

    Times of the track are hours within a session or a day; only their order matters here, so events are numbered.

    Raises:
        UserError: not well-formed XML, entities of its own, or no sessions.
    """
    number = 0
    for number, session in enumerate(_sessions(path), 1):
        user = session.get("userid") or f"session-{session.get('num', number)}"
        yield (
            user,
            [
                Event(time=datetime(2000, 1, 1) + timedelta(seconds=place), query=query, click=click)
                for place, (query, click) in enumerate(_events(session))
            ],
        )
    if not number:
        raise UserError(f"{str(path)!r} holds no <session>: give a Session track file")


def _sessions(path: Path) -> Iterator[ElementTree.Element]:
    """Each session of the file; it is emptied when the next one is asked for."""
    parser = ElementTree.XMLPullParser(["end"])
    try:
        for line, where in read_lines(path):
            if re.search(r"<!\s*(ENTITY|DOCTYPE)", line, re.IGNORECASE):
                raise UserError(
                    f"{where} declares a document type or entities: remove them, the track's files have none"
                )
            parser.feed(line)
            found: Iterator[Any] = parser.read_events()  # their type allows for other kinds than "end"
            for _, element in found:
                if element.tag == "session":
                    yield element
                    element.clear()
        parser.close()
    except ElementTree.ParseError as error:
        raise UserError(f"{str(path)!r} is not well-formed XML ({error}): give a Session track file") from None


def _events(session: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for interaction in session.findall("interaction"):
        query = interaction.findtext("query") or ""
        urls = {
            result.get("rank", ""): result.findtext("url") or "" for result in interaction.iterfind("results/result")
        }
        yield query, ""
        for click in interaction.iterfind("clicked/click"):
            if url := urls.get((click.findtext("rank") or "").strip(), "").strip():
                yield query, url
    if current := session.findtext("currentquery/query"):
        yield current, ""
