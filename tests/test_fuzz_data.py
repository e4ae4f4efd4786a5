"""500 damaged data files: each is read, or refused with one clear line. Seeded, so that a failure can be repeated."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from tppo_fast.data.sessions import Session, read_sessions, write_sessions
from tppo_fast.errors import UserError

FILES = 500
ROWS: list[dict[str, Any]] = [
    {"user_id": f"user {n}", "history": {"search": ["rye bread", f"rye bread {n}"], "click": ["bread.example"]},
     "next_queries": ["rye flour", "sourdough"], "relevant_queries": ["rye flour", "sourdough", "rye starter"]}
    for n in range(4)
]  # fmt: skip
ODD: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, float("nan"), float("-inf"), "", " ", "\0", "\ud800", "\u2028", "x" * 5000, "{}",
    [], [[]], [None], [""], ["a", 1], {}, {"search": None}, {"search": [[]]}, {"": ["a"]}, {"search": ["a"], "\n": ["b"]},
]  # fmt: skip


JUNK = [b"\xff", b"\0", b"\n", b'"', b"{", b"[" * 5000, b"9" * 5000, b"\xef\xbb\xbf"]


def structure(rng: random.Random) -> list[Any]:
    """Rows with a few values, names or whole rows replaced."""
    rows: list[Any] = json.loads(json.dumps(ROWS))
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        if not isinstance(row, dict) or rng.random() < 0.1:
            rows[rng.randrange(len(rows))] = rng.choice(ODD)
            continue
        name = rng.choice([*row, "history_", "next"])
        change = rng.random()
        if change < 0.2:
            row.pop(name, None)
        elif change < 0.4 and isinstance(row.get("history"), dict):
            row["history"][rng.choice(["search", "click", "buy"])] = rng.choice(ODD)
        elif change < 0.6 and isinstance(row.get(name), list):
            row[name].insert(0, rng.choice(ODD))
        else:
            row[name] = rng.choice(ODD)
    return rows


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out, repeated, inserted or lost at the end."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(out) + 1)
        end = min(len(out), start + rng.choice([1, 2, 8, 64]))
        replacement = [
            rng.randbytes(end - start),
            b"",
            bytes(out[start:end]) * 3,
            bytes(out[start:end]) + rng.choice(JUNK),
        ]
        out[start:end] = rng.choice(replacement)
        if rng.random() < 0.1:
            del out[start:]
    return bytes(out)


def jsonl_structure(path: Path, rng: random.Random) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in structure(rng)))


def jsonl_bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(damage("".join(json.dumps(row) + "\n" for row in ROWS).encode(), rng))


def parquet_structure(path: Path, rng: random.Random) -> None:
    """As far as Arrow can hold it: columns keep one type each."""
    name = rng.choice([*ROWS[0], "extra"])
    columns: dict[str, Any] = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    columns[name] = [rng.choice([value for value in ODD if value != "\ud800"])] * len(ROWS)
    if rng.random() < 0.2:
        columns.pop(rng.choice(list(columns)))
    size = rng.choice([1, 2, 100])
    try:
        write_table(pa.table(columns), path, row_group_size=size)
    except (pa.ArrowException, OverflowError):
        table = pa.table({key: [json.dumps(value) for value in values] for key, values in columns.items()})
        write_table(table, path, row_group_size=size)


def parquet_bytes(path: Path, rng: random.Random) -> None:
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    write_table(pa.table(columns), path, compression=rng.choice(["none", "snappy", "zstd"]))
    path.write_bytes(damage(path.read_bytes(), rng))


def outcome(path: Path) -> str:
    """ "read" or the refusal; whatever was read is sound enough to be written and read again."""
    try:
        sessions = read_sessions(path)
    except UserError as error:
        return str(error)
    copy = path.with_suffix(".copy.jsonl")
    write_sessions(copy, sessions)
    assert read_sessions(copy) == sessions
    assert all(isinstance(session, Session) for session in sessions)
    return "read"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [jsonl_structure, jsonl_bytes, parquet_structure, parquet_bytes])
def test_500_damaged_files(
    make: Callable[[Path, random.Random], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    suffix = ".jsonl" if "jsonl" in make.__name__ else ".parquet"
    outcomes = []
    for seed in range(FILES // 4):
        path = tmp_path / f"fuzz-{seed}{suffix}"
        make(path, random.Random(f"{make.__name__} {seed}"))
        outcomes.append(outcome(path))
        refusal = outcomes[-1]
        assert refusal == "read" or f"fuzz-{seed}{suffix}" in refusal, (seed, refusal)
        assert refusal.isprintable(), (seed, refusal)
        assert len(refusal) < 700, (seed, refusal)
    refused = [text for text in outcomes if text != "read"]
    assert len(refused) > len(outcomes) // 3  # the damage is real
    reasons = {text.partition(": ")[2] for text in refused}
    assert len(reasons) > 5  # and of many kinds
    assert capfd.readouterr() == ("", "")
