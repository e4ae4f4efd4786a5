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

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tppo_fast.atomic import write_atomic
from tppo_fast.data.rows import Session, parse_row, show, to_row
from tppo_fast.errors import UserError

__all__ = ["Session", "read_sessions", "split_by_user", "write_sessions"]


def read_sessions(path: str | os.PathLike[str]) -> list[Session]:
    """Every session of a ``.jsonl`` or ``.parquet`` file, in file order.

    Raises:
        UserError: the file cannot be read or is empty, or a row is no session; the message is one line and names file,
            line (Parquet: row, counted from 1), field, value and remedy.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"data file {show(str(path))} ends in {show(path.suffix)}: give a .jsonl or .parquet file")
    if _size(path) == 0:
        raise UserError(f"data file {show(str(path))} is empty: give a file with at least one session")
    sessions = list(readers[path.suffix](path))
    if not sessions:
        raise UserError(f"data file {show(str(path))} holds no session: give a file with at least one")
    return sessions


def write_sessions(path: str | os.PathLike[str], sessions: Iterable[Session]) -> None:
    """Write a ``.jsonl`` file that ``read_sessions`` gives back unchanged.

    The file appears complete or not at all: it is written under a temporary name beside ``path``, flushed to disk and
    renamed.

    Raises:
        UserError: wrong suffix, unwritable folder, no session, or a session that ``read_sessions`` would refuse.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise UserError(f"output file {show(str(path))} ends in {show(path.suffix)}: give a name ending in .jsonl")
    lines = [_line(session, f"session {number}") for number, session in enumerate(sessions, 1)]
    if not lines:
        raise UserError(f"output file {show(str(path))}: there is no session to write; give at least one")
    try:
        write_atomic(path, "".join(lines).encode())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise UserError(f"output file {show(str(path))} cannot be written ({reason}): choose another place") from None


def split_by_user(sessions: Sequence[Session], fraction: float, seed: int) -> tuple[list[Session], list[Session]]:
    """Hold out about ``fraction`` of the USERS; returns (train, eval), each in the order given.

    A user is held out when a hash of seed and user_id, read as a number in [0, 1), is below ``fraction``: the same on
    every machine, and a user keeps the side when sessions are added. Where that leaves one side empty, the one user
    nearest to the threshold changes sides.

    Raises:
        UserError: fraction outside (0, 1), or fewer than two users.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(f"eval fraction = {fraction}: give a share of users above 0 and below 1")
    place = {session.user_id: _unit_hash(session.user_id, seed) for session in sessions}
    if len(place) < 2:
        raise UserError(f"a split by user needs at least 2 users, the data has {len(place)}: give a separate eval file")
    ranked = sorted(place, key=lambda user: (place[user], user))
    held_out = sum(value < fraction for value in place.values())
    chosen = set(ranked[: min(max(held_out, 1), len(ranked) - 1)])
    train = [session for session in sessions if session.user_id not in chosen]
    return train, [session for session in sessions if session.user_id in chosen]


def _size(path: Path) -> int:
    """Bytes of a file that can be opened."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:  # ValueError: the name itself is impossible, such as one with a NUL
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise UserError(f"data file {show(str(path))} cannot be read ({reason}): give a readable file") from None


def _unit_hash(user_id: str, seed: int) -> float:
    key = f"{seed}:{user_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "big") / 2**48


def _line(session: Session, where: str) -> str:
    row = to_row(session)
    parse_row(row, where)  # what is written can always be read
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_jsonl(path: Path) -> Iterator[Session]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{show(str(path))} line {number}"
            text = _decode(line, number, where)
            if text.strip():
                yield parse_row(_json(text, where), where)


def _decode(line: bytes, number: int, where: str) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start : error.start + 1]
        raise UserError(
            f"{where}: byte {bad!r} at position {error.start} is not UTF-8: save the file as UTF-8"
        ) from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error) if str(error).startswith("NaN") else "a number with too many digits"
    raise UserError(f"{where}: {show(text.strip())} is not JSON ({reason}): write one JSON object per line")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"NaN and Infinity are not allowed, found {name}")


def _read_parquet(path: Path) -> Iterator[Session]:
    place = show(str(path))
    with contextlib.closing(_parquet_rows(path)) as rows:
        for number in itertools.count(1):
            try:
                row = next(rows, None)
            except Exception as error:  # untrusted bytes: Arrow and datasets raise a dozen unrelated types
                reason = show(str(error).partition("\n")[0])
                raise UserError(
                    f"{place} row {number}: not a readable Parquet file of sessions ({type(error).__name__}: "
                    f"{reason}): write it again, or convert it to .jsonl"
                ) from None
            if row is None:
                return
            yield parse_row(row, f"{place} row {number}")


def _parquet_rows(path: Path) -> Generator[dict[str, Any], None, None]:
    """Rows as Python objects, streamed in Arrow form, so that no media column of a hostile file is ever decoded."""
    from datasets import Split  # imported here: it takes a second
    from datasets.io.parquet import ParquetDatasetReader

    with tempfile.TemporaryDirectory(prefix="tppo-fast-") as folder, _quiet_datasets():
        link = Path(folder, "sessions.parquet")
        link.symlink_to(path.resolve())  # datasets reads *, [ ], :: and hidden folders in a path as its own syntax
        reader = ParquetDatasetReader(str(link), split=Split.TRAIN, cache_dir=folder, streaming=True)
        dataset: Any = reader.read()  # typed as any of four classes; streaming gives the iterable one
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            columns = dict(zip(table.column_names, table.columns, strict=True))
            for index in range(table.num_rows):
                yield {name: column[index].as_py() for name, column in columns.items()}


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars, and no log lines beside the one sentence of the UserError."""
    from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled, logging

    bars, level = is_progress_bar_enabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()
