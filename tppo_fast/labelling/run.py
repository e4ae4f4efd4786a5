"""One labelling run: sessions and responses in; labels, what could not be judged, and a record of both out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tppo_fast
from tppo_fast.data.files import write_rows
from tppo_fast.data.rows import Session, searched, show
from tppo_fast.errors import UserError
from tppo_fast.hashing import sha256_of
from tppo_fast.labelling.journal import Entry, Journal, fill, journal_path
from tppo_fast.labelling.judges import Item, Judge, Rejected, labeller_id
from tppo_fast.labelling.records import (
    LabelledResponse,
    Response,
    parse_labels,
    read_labels,
    read_record,
    record_path,
    write_labels,
    write_record,
)
from tppo_fast.rewards.labels import Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What is labelled, and from which files it came."""

    sessions: Sequence[Session]
    """In file order."""
    responses: Sequence[Response]
    """In file order."""
    files: Mapping[str, Path]
    """``sessions`` and ``responses`` -> their files, for the record."""

    def item(self, response: Response) -> Item:
        """What a labeller sees of one response."""
        session = self.sessions[response.session - 1]
        return Item(
            history=tuple(searched(session.history)), next_queries=tuple(session.next_queries), response=response.text
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run has to do."""

    keys: list[str]
    """The key of every response, repeats included."""
    items: dict[str, Item]
    """Key -> what to judge: each distinct response once, in file order."""

    def pending(self, done: Mapping[str, Entry]) -> list[Item]:
        """What is not judged yet."""
        return [item for key, item in self.items.items() if key not in done]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run left behind."""

    labelled: int
    """Rows in the labels file."""
    rejected: int
    """Responses set aside with the reason, in ``rejects``."""
    rejects: Path
    """Where they are; there is no file without any."""
    failed: Sequence[str]
    """Why responses could not be judged this time, one reason each; they stand among the rejects, and the next run tries them."""


def plan(sources: Sources, identity: Mapping[str, Any]) -> Plan:
    """Equal responses to equal sessions are judged once."""
    labeller = labeller_id(identity)
    items = [sources.item(response) for response in sources.responses]
    keys = [item.key(labeller) for item in items]
    return Plan(keys=keys, items=dict(zip(keys, items, strict=True)))


def run(
    sources: Sources,
    judge: Judge,
    out: Path,
    work: Plan,
    *,
    concurrency: int,
    retry_rejects: bool = False,
    fresh: bool = False,
) -> Result:
    """Label everything and write ``out``; started again after any end, it goes on where it was.

    Args:
        sources: what to label.
        judge: who labels.
        out: the labels file; journal, record and rejects stand beside it.
        work: from ``plan``.
        concurrency: requests at once; 0 judges in this thread.
        retry_rejects: judge again what was set aside before.
        fresh: forget an earlier run into ``out``, whoever's labels it held.

    Raises:
        UserError: ``out`` holds another labeller's labels.
        LabellingFailed: the endpoint is down or refuses everything; what was judged is kept.
        Interrupted: SIGINT; what was judged is kept.
    """
    check_out(out, judge.identity, fresh=fresh)
    items = list(work.items.values())
    keys = list(work.items)

    def judge_chunk(numbers: Sequence[int]) -> list[Entry]:
        return [_entry(outcome) for outcome in judge.judge([items[i] for i in numbers])]

    with Journal(journal_path(out), fresh=fresh) as journal:
        if fresh:
            for path in (out, record_path(out), rejects_path(out)):
                path.unlink(missing_ok=True)
        if retry_rejects:
            journal.entries = without_rejects(journal.entries)
        failed = fill(
            journal, keys, judge_chunk, chunk=judge.chunk, concurrency=concurrency, verb="label", unit="response"
        )
        unjudged = {key: {"rejected": f"not judged yet: {reason}", "answer": ""} for key, reason in failed.items()}
        return _write(sources, judge, out, work, journal.entries | unjudged, [*failed.values()])


def without_rejects(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries that hold labels."""
    return {key: entry for key, entry in entries.items() if "rejected" not in entry}


def check_out(out: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
    """Refuse to replace a file that no labelling run wrote or, unless ``fresh``, another labeller's labels."""
    if not out.exists():
        return
    record = read_record(out)
    if record is None and not journal_path(out).exists():
        raise UserError(f"--out {show(str(out))} exists and was not written by a labelling run: choose another name")
    if not fresh and record and record.get("labeller", {}).get("id") != labeller_id(identity):
        raise UserError(
            f"--out {show(str(out))} holds labels of {record.get('labeller', {}).get('id')}, not {labeller_id(identity)}: "
            "choose another name, or use --fresh"
        )


def check_sources(out: Path, sources: Sources, work: Plan) -> None:
    """Refuse to drop labels: those in ``out`` must be of what is labelled now, which may be more."""
    if not out.exists():
        return
    record = read_record(out) or {}
    if all(record.get(name, {}).get("sha256") == sha256_of(path) for name, path in sources.files.items()):
        return
    if any(_item(label).key(label.labeller) not in work.items for label in read_labels(out)):
        raise UserError(
            f"--out {show(str(out))} holds labels of other sessions or responses, which would be lost: choose another name, or "
            "use --fresh"
        )


def check_sampled_for(responses: Path, sessions: Path) -> None:
    """Refuse responses whose record says that they were sampled for another sessions file: rows of one user may have moved."""
    record = read_record(responses) or {}
    if record.get("sessions_sha256", expected := sha256_of(sessions)) != expected:
        raise UserError(
            f"--responses {show(str(responses))} was sampled for other sessions than {show(str(sessions))}: give that file, or "
            f"remove {show(str(record_path(responses)))} if every session still stands in its row"
        )


def _item(label: LabelledResponse) -> Item:
    """What was judged."""
    return Item(history=tuple(searched(label.history)), next_queries=tuple(label.next_queries), response=label.response)


def rejects_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.rejects.jsonl")


def _entry(outcome: Labels | Rejected) -> Entry:
    if isinstance(outcome, Rejected):
        return {"rejected": outcome.reason, "answer": outcome.answer}
    spans = [list(span) for span in outcome.spans]
    return {"spans": spans, "classes": outcome.classes, "sentence": outcome.sentence}


def _write(
    sources: Sources, judge: Judge, out: Path, work: Plan, entries: Mapping[str, Entry], failed: Sequence[str]
) -> Result:
    """The files, from the journal and what failed now: the same bytes however often the run was stopped."""
    labeller = labeller_id(judge.identity)
    labels, rejects = [], []
    for response, key in zip(sources.responses, work.keys, strict=True):
        entry = entries[key]
        if "rejected" in entry:
            row = {"session": response.session, "user_id": response.user_id, "response": response.text}
            rejects.append({**row, "reason": entry["rejected"], "answer": entry["answer"], "labeller": labeller})
            continue
        session = sources.sessions[response.session - 1]
        labels.append(
            LabelledResponse(
                user_id=session.user_id,
                history=session.history,
                next_queries=session.next_queries,
                response=response.text,
                labels=parse_labels(entry, response.text, f"{show(str(journal_path(out)))} entry {key[:12]}"),
                labeller=labeller,
            )
        )
    if rejects:
        write_rows(rejects_path(out), rejects, "reject")
    else:
        rejects_path(out).unlink(missing_ok=True)
    if labels:
        write_labels(out, labels)
        write_record(out, _record(sources, judge, out, len(labels), len(rejects), len(work.items)))
    return Result(labelled=len(labels), rejected=len(rejects), rejects=rejects_path(out), failed=failed)


def _record(sources: Sources, judge: Judge, out: Path, labelled: int, rejected: int, distinct: int) -> dict[str, Any]:
    return {
        "tppo_fast": tppo_fast.__version__,
        "labels": {"file": out.name, "sha256": sha256_of(out)},
        **{name: {"file": path.name, "sha256": sha256_of(path)} for name, path in sources.files.items()},
        "labeller": {"id": labeller_id(judge.identity), **judge.identity},
        "endpoint": getattr(judge, "endpoint", None),  # of the last start
        "labelled": labelled,
        "distinct": distinct,
        "rejected": rejected,
    }
