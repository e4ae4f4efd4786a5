"""Work that survives being killed at any moment: an append-only journal, and the loop that fills it."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path
from typing import IO, Any

from tppo_fast.atomic import lock
from tppo_fast.background import at_once, started
from tppo_fast.data.rows import show
from tppo_fast.errors import LabellingFailed, UserError
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.progress import Progress

Entry = dict[str, Any]
Work = Callable[[Sequence[int]], list[Entry]]
"""Numbers of one chunk's items -> one entry each."""

GRACE = 10.0
"""Seconds that requests under way may take to be answered, and kept, after Ctrl-C."""
LIMIT = 5
"""Failed chunks in a row, beyond those under way at once, after which the run stops."""


class Journal:
    """Entries by key in a JSON Lines file. What ``append`` returned from is on disk; a torn last line is cut off.

    ``fresh`` forgets what it held.

    Raises:
        UserError: the file cannot be written, is no journal, or another process is writing it.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{show(str(path))} cannot be written ({error.strerror}): choose another --out") from None
        try:
            lock(self._file, f"{show(str(path))} is being written by another run: wait for it, or stop it")
            if fresh:
                self._file.truncate(0)
            self._load()
        except BaseException:
            self._file.close()
            raise

    def _load(self) -> None:
        self._file.seek(0)
        self.entries, good = _parse(self._file, self.path)
        self._file.truncate(good)

    def append(self, entries: dict[str, Entry]) -> None:
        """Keep entries under their keys; they are on disk when this returns."""
        lines = [json.dumps({"key": key, **entry}, ensure_ascii=False) + "\n" for key, entry in entries.items()]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries.update(entries)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def journal_path(out: Path) -> Path:
    """Where the journal of a run into ``out`` is."""
    return out.with_name(f"{out.name}.journal")


def read_journal(path: Path) -> dict[str, Entry]:
    """The entries of a journal that is not written now; none where there is no file."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        return _parse(file, path)[0]


def _parse(file: IO[bytes], path: Path) -> tuple[dict[str, Entry], int]:
    """Entries by key, and how many bytes hold whole ones."""
    entries: dict[str, Entry] = {}
    good = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break  # killed while writing it
        try:
            entry = json.loads(line)
            entries[entry.pop("key")] = entry
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{show(str(path))} line {number} is no journal entry: remove the file, or use --fresh"
            ) from None
        good += len(line)
    return entries, good


def fill(
    journal: Journal, keys: Sequence[str], work: Work, *, chunk: int, concurrency: int, verb: str, unit: str
) -> dict[str, str]:
    """Work until the journal holds every key that can be worked on now.

    Chunks are always the same ``chunk`` neighbours of ``keys``; a chunk that is only partly in the journal is worked on
    again as a whole and the missing part kept, so that a kill changes nothing of what a chunk gives.

    Args:
        journal: what is done already and will be.
        keys: of all items, distinct.
        work: makes the entries of one chunk; called from ``concurrency`` threads, or from this one where that is 0.
        chunk: items of one call.
        concurrency: calls at once.
        verb: for the progress display.
        unit: for the progress display.

    Returns:
        The keys that were tried and failed, with the reason; a later call tries them again.

    Raises:
        LabellingFailed: a failure that repeating cannot help, or too many in a row; what was done is in the journal.
        Interrupted: SIGINT; what was done is in the journal.
    """
    chunks = [range(start, min(start + chunk, len(keys))) for start in range(0, len(keys), chunk)]
    missing = [c for c in chunks if not all(keys[i] in journal.entries for i in c)]
    done = sum(key in journal.entries for key in keys)
    failed: dict[str, str] = {}
    fatal: LabellingFailed | None = None
    in_a_row = 0
    stop = threading.Event()
    with (
        InterruptGuard("when what is under way is done and kept") as guard,
        Progress(verb, len(keys), unit, start=done) as progress,
    ):
        try:
            for numbers, outcome in _outcomes(missing, work, concurrency, guard, stop):
                if isinstance(outcome, LabellingFailed):
                    failed |= {keys[i]: str(outcome) for i in numbers if keys[i] not in journal.entries}
                    in_a_row += 1
                    if fatal is None and (outcome.final or in_a_row >= LIMIT + concurrency):
                        fatal = outcome
                        stop.set()
                    continue
                in_a_row = 0
                pairs = zip(numbers, outcome, strict=True)
                new = {keys[i]: entry for i, entry in pairs if keys[i] not in journal.entries}
                journal.append(new)
                progress.update(len(new))
        except Interrupted:
            kept = sum(key in journal.entries for key in keys)
            raise Interrupted(f"stopped with {kept} of {len(keys)} done and saved; the same command goes on") from None
    if fatal is not None:
        kept = sum(key in journal.entries for key in keys)
        raise LabellingFailed(
            f"{fatal}; {kept} of {len(keys)} are done and saved, the same command goes on with the rest"
        )
    return failed


def _outcomes(
    chunks: Sequence[range], work: Work, concurrency: int, guard: InterruptGuard, stop: threading.Event
) -> Iterator[tuple[range, list[Entry] | LabellingFailed]]:
    """(chunk, its entries or failure) as they are finished.

    What is under way when ``stop`` is set, or at a Ctrl-C, still comes; after a Ctrl-C then ``Interrupted``.
    """
    begin = started if concurrency else at_once
    left, running = iter(chunks), dict[Future[list[Entry]], range]()
    asked, deadline = False, math.inf
    while True:
        try:
            guard.check()
        except Interrupted:
            asked = True
            stop.set()
        while not stop.is_set() and len(running) < max(concurrency, 1) and (numbers := next(left, None)):
            running[begin(partial(work, numbers))] = numbers
        if stop.is_set():
            deadline = min(deadline, time.monotonic() + GRACE)
        if not running or time.monotonic() > deadline:
            break
        for future in wait(running, 0.1, FIRST_COMPLETED).done:
            error = future.exception()
            yield running.pop(future), error if isinstance(error, LabellingFailed) else future.result()
    if asked:
        raise Interrupted
