"""Rows of untrusted data on disk, JSON Lines or Parquet: read with line numbers, written atomically."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tppo_fast.atomic import write_atomic
from tppo_fast.data.rows import show
from tppo_fast.errors import UserError

T = TypeVar("T")
Row = dict[str, Any]
LONGEST_LINE = 1 << 26
"""Bytes of one line, unpacked: a small archive must not fill the memory."""


def check_rows(path: Path, noun: str, *, any_suffix: bool = False) -> None:
    """Look at a file that ``read_rows`` will read, without reading it.

    Raises:
        UserError: it cannot be opened, is empty, or has another suffix.
    """
    size = _size(path)
    if path.suffix not in (".jsonl", ".parquet") and not any_suffix:
        raise UserError(f"data file {show(str(path))} ends in {show(path.suffix)}: give a .jsonl or .parquet file")
    if size == 0:
        raise UserError(f"data file {show(str(path))} is empty: give a file with at least one {noun}")


def read_rows(path: Path, parse: Callable[[object, str], T], noun: str, *, any_suffix: bool = False) -> list[T]:
    """Every row of a ``.jsonl`` or ``.parquet`` file, in file order.

    Args:
        path: the file.
        parse: (decoded row, its place) -> what the row stands for.
        noun: what a row is called in messages, such as "session".
        any_suffix: whether what does not end in ``.parquet`` is JSON Lines.

    Raises:
        UserError: the file cannot be read or is empty, or ``parse`` refused a row; one line that names file, line
            (Parquet: row, counted from 1) and remedy.
    """
    check_rows(path, noun, any_suffix=any_suffix)
    read = _read_parquet if path.suffix == ".parquet" else _read_jsonl
    with contextlib.closing(read(path)) as found:
        rows = [parse(row, where) for row, where in found]
    if not rows:
        raise UserError(f"data file {show(str(path))} holds no {noun}: give a file with at least one")
    return rows


def read_lines(path: Path) -> Generator[tuple[str, str], None, None]:
    """(text, its place) of each line of a UTF-8 file, ``.gz`` unpacked; one line in memory at a time.

    Only "\\n" ends a line, and stays on it: a query may hold what Unicode calls a line end.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8 or longer than ``LONGEST_LINE``.
    """
    _size(path)  # it can be opened
    name, number = show(str(path)), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                where = f"{name} line {number}"
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{where} has more than {LONGEST_LINE} bytes: break it into lines")
                yield _decode(line, number, where), where
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "not a whole gzip file"
        raise UserError(f"data file {name} cannot be read ({reason}): give a readable file") from None


def check_output(out: Path, *inputs: Path) -> None:
    """Refuse an ``--out`` that ``write_rows`` could not write, or that is one of the ``inputs``, before anything is read.

    Raises:
        UserError: wrong suffix, no such folder, or the file of an input.
    """
    if out.suffix not in (".jsonl", ".parquet") or not out.parent.is_dir():
        raise UserError(f"--out {str(out)!r}: give a name ending in .jsonl or .parquet, in a folder that exists")
    if any(
        out.resolve() == path.resolve() or (out.exists() and path.exists() and out.samefile(path)) for path in inputs
    ):
        raise UserError(f"--out {str(out)!r} is a file to be read, and would be lost: choose another name")


def write_rows(path: Path, rows: Sequence[Row], noun: str) -> None:
    """Write rows that ``read_rows`` gives back; the same rows give the same bytes. The file appears complete or not at all.

    Raises:
        UserError: wrong suffix, no rows, or a place that cannot be written.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"output file {show(str(path))} ends in {show(path.suffix)}: give a name ending in .jsonl or .parquet"
        )
    if not rows:
        raise UserError(f"output file {show(str(path))}: there is no {noun} to write; give at least one")
    content = "".join(map(json_line, rows)).encode() if path.suffix == ".jsonl" else _parquet(rows)
    try:
        write_atomic(path, content)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise UserError(f"output file {show(str(path))} cannot be written ({reason}): choose another place") from None


def json_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa  # imported here: it takes time
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def _size(path: Path) -> int:
    """Bytes of a file that can be opened."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:  # ValueError: the name itself is impossible, such as one with a NUL
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise UserError(f"data file {show(str(path))} cannot be read ({reason}): give a readable file") from None


def _read_jsonl(path: Path) -> Generator[tuple[object, str], None, None]:
    for text, where in read_lines(path):
        if text.strip():
            yield _json(text, where), where


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
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error) if str(error).startswith("NaN") else "a number with too many digits"
    raise UserError(f"{where}: {show(text.strip())} is not JSON ({reason}): write one JSON object per line")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"NaN and Infinity are not allowed, found {name}")


def _read_parquet(path: Path) -> Generator[tuple[object, str], None, None]:
    place = show(str(path))
    with contextlib.closing(_parquet_rows(path)) as rows:
        for number in itertools.count(1):
            try:
                row = next(rows, None)
            except Exception as error:  # untrusted bytes: Arrow raises a dozen unrelated types
                reason = show(str(error).partition("\n")[0])
                raise UserError(
                    f"{place} row {number}: not a readable Parquet file ({type(error).__name__}: "
                    f"{reason}): write it again, or convert it to .jsonl"
                ) from None
            if row is None:
                return
            yield row, f"{place} row {number}"


def _parquet_rows(path: Path) -> Generator[Row, None, None]:
    """Rows as Python objects, converted one by one, so that the row with a bad value is the one that is named."""
    from pyarrow import parquet  # imported here: it takes time

    with path.open("rb") as file, parquet.ParquetFile(file) as rows:
        for batch in rows.iter_batches(1000):
            for row in batch.to_struct_array():
                yield row.as_py()
