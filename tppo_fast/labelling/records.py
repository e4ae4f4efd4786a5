"""Responses and their labels on disk.

Labels, one JSON object per line of a ``.jsonl`` file, or the same columns in a ``.parquet`` file. A row stands alone:

    {"user_id": "u17", "history": {"search": ["lisbon"]}, "next_queries": ["lisbon tram map"],
     "response": " lisbon map, rome", "spans": [[1, 7], [8, 11], [11, 12], [13, 17]], "classes": [2, 2, 0, 1],
     "sentence": 1, "labeller": "lexical/5f2c9d0e1a7b"}

``spans`` are (start, end) characters of ``response``, end exclusive; ``classes`` 0 separator, 1 irrelevant, 2 relevant, one
per span; ``sentence`` 0 or 1 for the whole response. Beside a file F that ``tppo-fast label`` wrote stands F.record.json: the
hashes of its sessions, responses and labels, and who labelled, with the template's version and hash, and at which endpoint.

Responses to label, in the same two formats; ``session`` is the row of the sessions file, counted from 1, and ``user_id`` must be
that row's, so that a reordered sessions file is noticed (one user's own rows: by the record of responses sampled here):

    {"session": 12, "user_id": "u17", "response": " lisbon map, rome"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tppo_fast.atomic import write_atomic
from tppo_fast.data.files import Row, read_rows, write_rows
from tppo_fast.data.rows import Session, parse_row, show, to_row
from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import Labels

LABEL_FIELDS = ("user_id", "history", "next_queries", "response", "spans", "classes", "sentence", "labeller")
RESPONSE_FIELDS = ("session", "user_id", "response")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledResponse:
    """One response and what one labeller says about it."""

    user_id: str
    """Whose session it answers; splits are by user."""
    history: Mapping[str, Sequence[str]]
    """Kind of event -> its entries, oldest first, as in ``Session``."""
    next_queries: Sequence[str]
    """What the user really asked next."""
    response: str
    """The response's text exactly as sampled, a leading space included; ``labels.spans`` index its characters."""
    labels: Labels
    """Word classes and the sentence label."""
    labeller: str
    """Who labelled: name and a hash of everything that decides its labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response to label."""

    session: int
    """Row of the session in its file, from 1."""
    user_id: str
    """Of that session."""
    text: str
    """The response as sampled; may be empty."""


def read_labels(path: str | Path) -> list[LabelledResponse]:
    """Every labelled response of a ``.jsonl`` or ``.parquet`` file, in file order.

    Raises:
        UserError: unreadable file or bad row; one line that names file, line (Parquet: row, from 1), field and remedy.
    """
    return read_rows(Path(path), parse_label, "labelled response")


def write_labels(path: str | Path, labels: Iterable[LabelledResponse]) -> None:
    """Write a file that ``read_labels`` gives back unchanged; it appears complete or not at all.

    Raises:
        UserError: wrong suffix, unwritable place, no label, or one that ``read_labels`` would refuse.
    """
    rows = [to_label_row(label) for label in labels]
    for number, row in enumerate(rows, 1):
        parse_label(row, f"label {number}")
    write_rows(Path(path), rows, "labelled response")


def read_responses(path: str | Path, sessions: Sequence[Session]) -> list[Response]:
    """The responses of a file, each checked against the session it answers.

    Raises:
        UserError: as ``read_labels``, and for a response whose session is not in ``sessions`` or is another user's.
    """

    def parse(row: object, where: str) -> Response:
        fields = _fields(row, RESPONSE_FIELDS, where)
        number, user = fields["session"], fields["user_id"]
        if not _is_int(number) or not 1 <= number <= len(sessions):
            raise UserError(f"{where}: session = {show(number)}: give a row of the sessions file, 1 to {len(sessions)}")
        if user != (expected := sessions[number - 1].user_id):
            raise UserError(
                f"{where}: user_id = {show(user)}, but session {number} is of user {show(expected)}: give the sessions "
                "file that the responses were sampled for"
            )
        return Response(session=number, user_id=user, text=_response(fields["response"], where))

    return read_rows(Path(path), parse, "response")


def write_responses(path: str | Path, responses: Iterable[Response]) -> None:
    """Write a file that ``read_responses`` gives back unchanged.

    Raises:
        UserError: wrong suffix, unwritable place, or no response.
    """
    rows = [{"session": r.session, "user_id": r.user_id, "response": r.text} for r in responses]
    write_rows(Path(path), rows, "response")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """The sidecar of the labels file ``path``: what it was made of."""
    write_atomic(record_path(path), (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The sidecar of a labels file, or None where it has none."""
    place = record_path(Path(path))
    try:
        return json.loads(place.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{show(str(place))} is not JSON: remove it, or label again with --fresh") from None


def record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.record.json")


def to_label_row(label: LabelledResponse) -> Row:
    """The JSON object ``parse_label`` reads back."""
    return {
        "user_id": label.user_id,
        "history": {kind: list(entries) for kind, entries in label.history.items()},
        "next_queries": list(label.next_queries),
        "response": label.response,
        "spans": [list(span) for span in label.labels.spans],
        "classes": list(label.labels.classes),
        "sentence": label.labels.sentence,
        "labeller": label.labeller,
    }


def parse_label(row: object, where: str) -> LabelledResponse:
    """The labelled response one decoded row stands for.

    Raises:
        UserError: the row is none; the message starts with ``where``.
    """
    fields = _fields(row, LABEL_FIELDS, where)
    session = parse_row({name: fields[name] for name in ("user_id", "history", "next_queries")}, where)
    response = _response(fields["response"], where)
    labeller = fields["labeller"]
    if not isinstance(labeller, str) or not labeller.strip():
        raise UserError(f"{where}: labeller = {show(labeller)}: write who labelled, as text")
    kept = to_row(session)
    return LabelledResponse(
        user_id=session.user_id,
        history={kind: tuple(entries) for kind, entries in kept["history"].items()},
        next_queries=tuple(kept["next_queries"]),
        response=response,
        labels=parse_labels(fields, response, where),
        labeller=labeller,
    )


def parse_labels(fields: Mapping[str, Any], response: str, where: str) -> Labels:
    """``spans``, ``classes`` and ``sentence`` of a row as Labels of ``response``."""
    spans, classes, sentence = fields["spans"], fields["classes"], fields["sentence"]
    if not isinstance(spans, list) or not all(_is_pair(span) for span in spans):
        raise UserError(f"{where}: spans = {show(spans)}: write a list of [start, end] character positions")
    if not isinstance(classes, list) or not all(map(_is_int, classes)) or not _is_int(sentence):
        raise UserError(
            f"{where}: classes = {show(classes)}, sentence = {show(sentence)}: write a list of whole numbers and a number"
        )
    try:
        labels = Labels(spans=[(start, end) for start, end in spans], classes=classes, sentence=sentence)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if labels.spans and labels.spans[-1][1] > len(response):
        raise UserError(
            f"{where}: span {show(spans[-1])} ends after the response, which has {len(response)} characters: label the "
            "response again"
        )
    return labels


def _fields(row: object, names: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: {show(row)} is not an object: write one with {', '.join(names)}")
    for name in names:
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing: the fields are {', '.join(names)}")
    for name in row:
        if name not in names:
            raise UserError(f"{where}: unknown field {show(name)}: the fields are {', '.join(names)}")
    return row


def _response(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: response = {show(value)} is not text: write it as a string in quotes")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: response = {show(value)} holds an unpaired surrogate: remove or replace it")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_int, value))
