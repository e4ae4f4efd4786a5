"""One session, and the validation of one row of untrusted data into it. Schema: ``tppo_fast.data.sessions``."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tppo_fast.errors import UserError

REQUIRED = ("user_id", "history", "next_queries")
FIELDS = (*REQUIRED, "relevant_queries")
LONGEST = 100_000
"""Characters of one text. Nobody types more, and a tokenizer may need minutes for one word of millions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What one user did, and what the user asked next."""

    user_id: str
    """Whose session it is; several sessions of one user share it."""
    history: Mapping[str, Sequence[str]]
    """Kind of event (``search``, ``click``, ``purchase``, ``visit``, ...) -> its entries, oldest first. Not empty."""
    next_queries: Sequence[str]
    """The queries asked next, in order. Empty where nobody knows them: to sample, and nothing else."""
    relevant_queries: Sequence[str] = ()
    """Every query known to be relevant; left out, it becomes ``next_queries``."""

    def __post_init__(self) -> None:
        if not self.relevant_queries:
            object.__setattr__(self, "relevant_queries", self.next_queries)


def searched(history: Mapping[str, Sequence[str]]) -> list[str]:
    """The queries of a history, oldest first; every entry, kind after kind, where nothing was searched."""
    return list(history.get("search") or [entry for kind in sorted(history) for entry in history[kind]])


def parse_history(row: object, where: str) -> Session:
    """``parse_row`` of a row whose ``next_queries`` nobody knows, or asks for: they are not read."""
    fields = _fields(row, where, ("user_id", "history"))
    user_id = _text(fields["user_id"], "user_id", where)
    return Session(user_id=user_id, history=_history(fields["history"], where), next_queries=())


def parse_row(row: object, where: str) -> Session:
    """The session one decoded row stands for.

    A kind of event without entries (``[]`` or null) is left out; null ``relevant_queries`` mean the column is absent:
    Parquet gives every row all columns.

    Args:
        row: anything a JSON or Parquet reader may return.
        where: the row's place, with which every message starts ("sessions.jsonl line 3").

    Raises:
        UserError: the row is no session; the message names place, field, value and remedy.
    """
    fields = _fields(row, where, REQUIRED)
    user_id = _text(fields["user_id"], "user_id", where)
    history = _history(fields["history"], where)
    next_queries = _texts(fields["next_queries"], "next_queries", where)
    if not next_queries:
        raise UserError(f"{where}: next_queries = [] is empty: give at least one query or remove the row")
    relevant = fields.get("relevant_queries")
    if relevant is None:
        return Session(user_id=user_id, history=history, next_queries=next_queries)
    relevant = _texts(relevant, "relevant_queries", where)
    if not relevant:
        raise UserError(f"{where}: relevant_queries = [] is empty: leave the field out to use next_queries")
    return Session(user_id=user_id, history=history, next_queries=next_queries, relevant_queries=relevant)


def to_row(session: Session) -> dict[str, Any]:
    """The JSON object ``parse_row`` reads back; ``relevant_queries`` only where they say more than ``next_queries``."""
    row: dict[str, Any] = {
        "user_id": session.user_id,
        "history": {kind: list(entries) for kind, entries in session.history.items()},
        "next_queries": list(session.next_queries),
    }
    if list(session.relevant_queries) != row["next_queries"]:
        row["relevant_queries"] = list(session.relevant_queries)
    return row


def show(value: object) -> str:
    """A short, single-line, printable form of any value."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a {value.bit_length()}-bit number"  # Python refuses to print the longest ones
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 48
    short.maxlevel = short.maxlist = short.maxdict = 3
    return " ".join(short.repr(value).split())


def _fields(row: object, where: str, required: Sequence[str]) -> Mapping[Any, Any]:
    """The row, which has all of the ``required`` fields and none that is unknown."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: {show(row)} is not an object: write one session with {', '.join(required)}")
    for name in row:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name)[:99], FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(FIELDS)}"
            raise UserError(f"{where}: unknown field {show(name)}: {hint}")
    for name in required:
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing: add it or remove the row")
    return row


def _history(value: object, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise UserError(f'{where}: history = {show(value)} is not an object: write {{"search": ["oldest", "newest"]}}')
    history: dict[str, tuple[str, ...]] = {}
    for kind, entries in value.items():
        if not isinstance(kind, str) or not kind.strip() or not kind.isprintable():
            raise UserError(
                f"{where}: history has the kind {show(kind)}: name it with printable text, such as 'search'"
            )
        checked = () if entries is None else _texts(entries, f"history.{kind}", where)
        if checked:
            history[kind] = checked
    if not history:
        raise UserError(f"{where}: history = {show(value)} is empty: give at least one entry or remove the row")
    return history


def _texts(value: object, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {_short(name)} = {show(value)} is not a list: write a list of texts")
    return tuple(_text(item, f"{name}[{index}]", where) for index, item in enumerate(value))


def _text(value: object, name: str, where: str) -> str:
    name = _short(name) if not isinstance(value, str) or len(name) > 60 else name
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} = {show(value)} is not text: write it as a string in quotes")
    if not value.strip():
        raise UserError(f"{where}: {_short(name)} = {show(value)} is blank: remove it or fill it in")
    if len(value) > LONGEST:
        raise UserError(
            f"{where}: {_short(name)} = {show(value)} has {len(value)} characters, and at most {LONGEST} are taken: shorten or "
            "remove it"
        )
    if "\0" in value:
        raise UserError(f"{where}: {_short(name)} = {show(value)} holds a NUL character: remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: {_short(name)} = {show(value)} holds an unpaired surrogate: remove or replace it")
    return value


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}"
