"""Sessions on disk: what is read, what is refused and how, atomic writing, the split by user."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo_fast.config import RunConfig
from tppo_fast.data.rows import searched
from tppo_fast.data.sessions import Session, of_many_users, read_sessions, split_by_user, write_sessions
from tppo_fast.errors import UserError
from tppo_fast.runs import load_sessions
from tppo_fast.sections import build_section

ROW: dict[str, Any] = {
    "user_id": "u1",
    "history": {"search": ["oat milk", "oat milk brands"], "click": ["example.org/oats"]},
    "next_queries": ["oat milk recipe", "soy milk"],
}


def jsonl(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def parquet(folder: Path, columns: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = folder / "rows.parquet"
    write_table(pyarrow.table(columns), path)
    return path


def changed(**fields: Any) -> str:
    return json.dumps(ROW | fields)


def message(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        read_sessions(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) < 600
    return text


def test_jsonl_gives_the_rows_in_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path, json.dumps(ROW), "", changed(user_id="ü2", relevant_queries=["soy milk"]))
    first, second = read_sessions(path)
    assert first.history == {"search": ("oat milk", "oat milk brands"), "click": ("example.org/oats",)}
    assert list(first.relevant_queries) == list(first.next_queries) == ["oat milk recipe", "soy milk"]
    assert (second.user_id, list(second.relevant_queries)) == ("ü2", ["soy milk"])


def test_jsonl_tolerates_byte_order_mark_crlf_and_empty_kinds(tmp_path: Path) -> None:
    row = changed(history={"search": ["oat milk"], "click": [], "visit": None}, relevant_queries=None)
    (session,) = read_sessions(jsonl(tmp_path, b"\xef\xbb\xbf" + row.encode() + b"\r"))
    assert session.history == {"search": ("oat milk",)}


def test_parquet_reads_the_same_as_jsonl(tmp_path: Path) -> None:
    rows = [
        {**ROW, "relevant_queries": None},
        {**ROW, "user_id": "u2", "history": {"search": ["tea"], "click": None}, "relevant_queries": ["tea pot"]},
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert read_sessions(parquet(tmp_path, columns)) == read_sessions(jsonl(tmp_path, *map(json.dumps, rows)))


def test_what_was_searched_does_not_hang_on_the_order_of_kinds() -> None:
    """Parquet gives every row the same order of kinds."""
    assert searched({"visit": ["b"], "click": ["a1", "a2"]}) == ["a1", "a2", "b"]
    assert searched({"click": ["a"], "search": ["c"]}) == ["c"]


def test_parquet_name_is_taken_literally(tmp_path: Path) -> None:
    """Such characters are patterns or chained addresses to some readers."""
    folder = tmp_path / ".hidden [1]*"
    folder.mkdir()
    odd = parquet(folder, {name: [value] for name, value in ROW.items()}).rename(folder / "a::b?.parquet")
    assert len(read_sessions(odd)) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param("{", ["not JSON", "column"], id="not JSON"),
        pytest.param(json.dumps(ROW) + json.dumps(ROW), ["not JSON", "Extra data"], id="two objects on a line"),
        pytest.param("[1, 2]", ["[1, 2]", "not an object"], id="list"),
        pytest.param("null", ["None is not an object"], id="null"),
        pytest.param(changed(next_query=["x"]), ["'next_query'", "did you mean 'next_queries'"], id="unknown field"),
        pytest.param('{"user_id": "u"}', ["'history' is missing"], id="missing field"),
        pytest.param(changed(user_id=7), ["user_id = 7 is not text"], id="number for text"),
        pytest.param(changed(user_id=" \t"), ["user_id", "blank"], id="blank user"),
        pytest.param(changed(history=["tea"]), ["history", "not an object"], id="history list"),
        pytest.param(changed(history={}), ["history = {} is empty"], id="no history"),
        pytest.param(changed(history={"search": []}), ["history", "is empty"], id="no entries"),
        pytest.param(changed(history={"": ["x"]}), ["kind ''"], id="blank kind"),
        pytest.param(changed(history={"a\nb": ["x"]}), [r"kind 'a\nb'"], id="kind with line break"),
        pytest.param(changed(history={"search": "tea"}), ["history.search = 'tea' is not a list"], id="text for list"),
        pytest.param(changed(history={"search": ["a", None]}), ["history.search[1] = None"], id="null entry"),
        pytest.param(changed(next_queries=[]), ["next_queries = [] is empty"], id="no next queries"),
        pytest.param(changed(next_queries=["a", ""]), ["next_queries[1] = ''", "blank"], id="blank query"),
        pytest.param(
            changed(relevant_queries=[]), ["relevant_queries", "leave the field out"], id="no relevant queries"
        ),
        pytest.param(changed(next_queries=[["a"]]), ["next_queries[0] = ['a'] is not text"], id="nested list"),
        pytest.param(changed(next_queries=["a\0b"]), ["NUL"], id="NUL"),
        pytest.param(
            changed(history={"search": ["a", "q" * 10_000_000]}),
            ["history.search[1] = 'qqq", "has 10000000 characters, and at most 100000", "shorten or remove it"],
            id="ten million letters",
        ),
        pytest.param(changed(user_id="\ud800"), ["unpaired surrogate", r"\ud800"], id="surrogate"),
        pytest.param(changed(user_id=float("nan")), ["NaN and Infinity", "found NaN"], id="NaN"),
        pytest.param(changed(user_id=-float("inf")), ["found -Infinity"], id="Infinity"),
        pytest.param(changed(user_id=10**4000), ["user_id = a 13288-bit number is not text"], id="huge number"),
        pytest.param('{"user_id": ' + "9" * 5000 + "}", ["too many digits"], id="unreadable number"),
        pytest.param("[" * 100_000, ["nested too deep"], id="deep nesting"),
        pytest.param(b'{"user_id": "\xff"}', [r"b'\xff' at position 13", "not UTF-8"], id="invalid UTF-8"),
        pytest.param(changed(user_id=["x" * 10_000] * 99), ["user_id = ['xxxxx", "is not text"], id="long value"),
        pytest.param(changed(**{"k" * 10_000: 1}), ["unknown field 'kkk"], id="long field name"),
        pytest.param(changed(history={"k" * 10_000: [1]}), ["history.kkk", "[0] = 1 is not text"], id="long kind"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str | bytes, words: list[str]) -> None:
    text = message(jsonl(tmp_path, json.dumps(ROW), line))
    assert "rows.jsonl' line 2: " in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        pytest.param({**ROW, "user_id": 5}, "row 1: user_id = 5 is not text", id="integer users"),
        pytest.param({**ROW, "user_id": b"u"}, "row 1: user_id = b'u' is not text", id="bytes"),
        pytest.param({**ROW, "history": [("search", ["a"])]}, "history = [{", id="list of pairs"),
        pytest.param({**ROW, "history": '{"search": ["a"]}'}, "is not an object", id="JSON text"),
        pytest.param({**ROW, "history": {"search": None}}, "is empty", id="null kinds"),
        pytest.param({**ROW, "next_queries": None}, "next_queries = None is not a list", id="null column"),
        pytest.param({"user_id": "u"}, "'history' is missing", id="missing column"),
        pytest.param({**ROW, "age": 1.5}, "unknown field 'age'", id="unknown column"),
    ],
)
def test_bad_parquet_row(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    if isinstance(columns.get("history"), list):
        columns = columns | {"history": [{"kind": "search", "entries": ["a"]}]}
    assert words in message(parquet(tmp_path, {name: [value] for name, value in columns.items()}))


def test_parquet_error_names_the_row(tmp_path: Path) -> None:
    columns = {name: [value] * 1500 for name, value in ROW.items()}
    columns["next_queries"] = [["tea"]] * 1234 + [[" "]] + [["tea"]] * 265
    assert "row 1235: next_queries[0] = ' ' is blank" in message(parquet(tmp_path, columns))


def test_damaged_parquet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from pyarrow import Table, array
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 this is no parquet file PAR1")
    assert "not a readable Parquet file" in message(path)
    write_table(
        Table.from_arrays([array(["u"]), array([1]), array([["x"]])], names=["user_id"] * 2 + ["history"]), path
    )
    assert "not a readable Parquet file" in message(path)
    assert capfd.readouterr() == ("", "")  # no log lines, no progress bars


def test_bad_files(tmp_path: Path) -> None:
    empty, blank, folder = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl", tmp_path / "folder.parquet"
    empty.touch()
    blank.write_text("\n \n")
    folder.mkdir()
    assert "is empty" in message(empty)
    assert "holds no session" in message(blank)
    assert "Is a directory" in message(folder)
    assert "No such file" in message(tmp_path / "absent.jsonl")
    (tmp_path / "rows.csv").write_text("a,b")
    assert "ends in '.csv'" in message(tmp_path / "rows.csv")
    assert "No such file" in message(tmp_path / "absent.csv")
    assert "not a file name" in message("a\0b.jsonl")


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(str.strip)
kinds = st.text(min_size=1).filter(lambda text: text.isprintable() and text.strip())
lists = st.lists(texts, min_size=1, max_size=4).map(tuple)
sessions = st.builds(
    Session, user_id=texts, history=st.dictionaries(kinds, lists, min_size=1, max_size=3), next_queries=lists,
    relevant_queries=lists,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(sessions, min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, written: list[Session]) -> None:
    path = tmp_path_factory.mktemp("rows") / "out.jsonl"
    write_sessions(path, written)
    assert read_sessions(path) == written


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Session(user_id="u", history={"search": ["tea"]}, next_queries=["pot"])
    bad = Session(user_id="u", history={"search": [""]}, next_queries=["pot"])
    path = tmp_path / "out.jsonl"
    write_sessions(path, [good])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"session 2: history\.search\[0\] = '' is blank"):
        write_sessions(path, [good, bad])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_sessions(path, [good, good])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("name", ["out.json", "absent/out.jsonl", "a\0b.jsonl", "x" * 300 + ".jsonl"])
def test_unwritable_places(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="output file"):
        write_sessions(tmp_path / name, [Session(user_id="u", history={"search": ["tea"]}, next_queries=["pot"])])
    assert not list(tmp_path.iterdir())


def users(count: int) -> list[Session]:
    return [
        Session(user_id=f"u{user}", history={"search": [f"{row}"]}, next_queries=["x"])
        for row in range(3)
        for user in range(count)
    ]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 2**31))
def test_split_keeps_every_session_and_parts_no_user(count: int, fraction: float, seed: int) -> None:
    everyone = users(count)
    train, held_out = split_by_user(everyone, fraction, seed)
    assert train
    assert held_out
    assert not {s.user_id for s in train} & {s.user_id for s in held_out}
    assert [s for s in everyone if s in train] == train
    assert len(train) + len(held_out) == len(everyone)
    assert split_by_user(everyone, fraction, seed) == (train, held_out)


def test_split_is_the_same_on_every_machine_and_stable_when_users_are_added() -> None:
    held_out = {s.user_id for s in split_by_user(users(20), 0.25, 0)[1]}
    assert held_out == HELD_OUT_OF_20
    later = {s.user_id for s in split_by_user(users(2000), 0.25, 0)[1]}
    assert {user for user in later if int(user[1:]) < 20} == held_out
    assert abs(len(later) / 2000 - 0.25) < 0.04
    assert {s.user_id for s in split_by_user(users(20), 0.25, 1)[1]} != held_out


@given(st.lists(st.integers(0, 8), max_size=40), st.integers(0, 40))
def test_the_first_sessions_are_of_as_many_users_as_can_be(owners: list[int], first: int) -> None:
    given_ = [Session(user_id=f"u{u}", history={"search": [f"{i}"]}, next_queries=["x"]) for i, u in enumerate(owners)]
    ordered = of_many_users(given_)
    assert sorted(ordered, key=repr) == sorted(given_, key=repr)
    assert len({s.user_id for s in ordered[:first]}) == min(first, len(owners), len(set(owners)))
    for user in {s.user_id for s in given_}:
        assert [s for s in ordered if s.user_id == user] == [s for s in given_ if s.user_id == user]


def test_a_run_s_seed_does_not_move_its_held_out_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sessions.jsonl"
    write_sessions(path, users(20))

    def split(**values: Any) -> tuple[list[Session], list[Session]]:
        data = {"train": str(path), "eval_fraction": 0.25, **values.pop("data", {})}
        return load_sessions(build_section({"data": data, **values}, RunConfig))

    train, held_out = split(seed=0)
    assert split(seed=5) == (train, held_out)
    assert {s.user_id for s in held_out} == HELD_OUT_OF_20
    assert len({s.user_id for s in held_out[:7]}) == 7
    assert {s.user_id for s in split(data={"split_seed": 1})[1]} != HELD_OUT_OF_20
    assert not capsys.readouterr().err
    other = tmp_path / "eval.jsonl"
    write_sessions(other, [*users(2), replace(users(1)[0], user_id="somebody else")])
    assert len(split(data={"eval": str(other)})[0]) == 60
    assert "warning: 2 of the 3 users of data.eval" in " ".join(capsys.readouterr().err.split())


def test_the_training_side_of_a_split_is_not_split_again_by_the_same_seed() -> None:
    train, _ = split_by_user(users(200), 0.1, 0)
    with pytest.raises(UserError, match=r"data\.split_seed = 0: none of 1\d\d users .* training side .*; give"):
        split_by_user(train, 0.1, 0)
    assert split_by_user(train, 0.1, 1)[1]
    few, _ = split_by_user(users(40), 0.1, 0)  # by chance, as far as one can see
    assert split_by_user(few, 0.1, 0)[1]


HELD_OUT_OF_20 = {"u1", "u4", "u5", "u8", "u14", "u16", "u18"}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_split_refuses_bad_fractions(fraction: float) -> None:
    with pytest.raises(UserError, match="fraction"):
        split_by_user(users(5), fraction, 0)


def test_split_needs_two_users() -> None:
    with pytest.raises(UserError, match="has 1"):
        split_by_user(users(1), 0.5, 0)
