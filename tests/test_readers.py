"""Logs of others, on invented rows: sessions split at pauses, targets, filters; nothing personal gets through."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tppo_fast import cli
from tppo_fast.data import files
from tppo_fast.data.readers import READERS, Rules, convert
from tppo_fast.data.readers.scrub import PATTERNS, Scrubber
from tppo_fast.data.sessions import read_sessions
from tppo_fast.errors import UserError

KEY = b"k" * 16
ONE = Rules(targets=1, gap=timedelta(days=999))


def aol(tmp_path: Path, rows: list[str], name: str = "log.txt") -> Path:
    text = "AnonID\tQuery\tQueryTime\tItemRank\tClickURL\n" + "\n".join(rows) + "\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


WALK = [
    "7\tgarden\t2006-03-01 10:00:00\t\t",
    "7\tgarden shed\t2006-03-01 10:05:00\t1\thttp://www.sheds.example",
    "7\tgarden shed\t2006-03-01 10:05:30\t4\thttp://other.example",
    "7\t-\t2006-03-01 10:06:00\t\t",
    "7\tshed plans\t2006-03-01 10:10:00\t\t",
    "7\tshed roof\t2006-03-01 10:39:00\t2\thttp://roof.example",
    "7\tshed roof felt\t2006-03-01 11:00:00\t\t",
    "7\tlater\t2006-03-01 11:31:00\t\t",
]


@pytest.mark.parametrize("name", ["log.txt", "log.txt.gz"])
def test_aol_by_hand(tmp_path: Path, name: str) -> None:
    sessions, dropped = convert(aol(tmp_path, WALK, name), "aol", Rules(), min_users=None, key=KEY)
    (session,) = sessions
    assert session.history == {
        "search": ("garden", "garden shed"), "click": ("http://www.sheds.example", "http://other.example"),
    }  # fmt: skip
    assert session.next_queries == (
        "shed plans",
        "shed roof",
        "shed roof felt",
    )  # the newest three; their clicks are gone
    assert session.user_id.startswith("u")
    assert session.user_id != "7"
    assert dropped == {"queries without a word": 1, "sessions that are too short": 1}


def test_filters_are_counted(tmp_path: Path) -> None:
    rows = [*WALK[:7], "7\twww.sheds.com\t2006-03-01 11:01:00\t\t", f"7\t{'long ' * 40}\t2006-03-01 11:02:00\t\t"]
    _, dropped = convert(aol(tmp_path, rows), "aol", Rules(), min_users=None, key=KEY)
    assert (dropped["queries that are an address"], dropped["queries that are too long"]) == (1, 1)


@pytest.mark.parametrize(
    ("query", "dropped"),
    [
        ("yahoo.com", True), ("mail.Yahoo.COM login", True), ("www garden", False), ("www.sheds", True), ("http://x", True),
        ("asp.net tutorial", False), (".net framework", False), ("http status 404", False), ("example.community", False),
        ("my.asp.net", True), ("a.b", False),
    ],
)  # fmt: skip
def test_what_an_address_is(tmp_path: Path, query: str, dropped: bool) -> None:
    rows = [*WALK[:7], f"7\t{query}\t2006-03-01 11:01:00\t\t"]
    _, counts = convert(aol(tmp_path, rows), "aol", Rules(), min_users=None, key=KEY)
    assert counts["queries that are an address"] == dropped


def test_users_keep_apart_and_pseudonyms_depend_on_the_key(tmp_path: Path) -> None:
    rows = [row.replace("7\t", f"{user}\t", 1) for row in WALK for user in (7, 8)]
    path = aol(tmp_path, rows)
    one, again, other = (convert(path, "aol", Rules(), min_users=None, key=key)[0] for key in (KEY, KEY, b"other"))
    assert len({s.user_id for s in one}) == 2
    assert [s.user_id for s in one] == [s.user_id for s in again] != [s.user_id for s in other]


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("mail jane.roe@example.org", "an e-mail address"), ("janeroe at gmail", "an e-mail address"),
        ("call 555-010-9999", "a phone number"), ("+44 20 7946 0958", "a phone number"),
        ("ssn 078-05-1120", "a social security number"), ("account 123456789", "a long number"),
        ("12 elm tree street", "a street address"), ("garden of zyxwv", "a word of few users"), ("garden 2006", None),
        ("garden 2006-2006", None), ("garden 2006 2006", None), ("garden 2006 of 12 34 56", "a long number"),
    ],
)  # fmt: skip
def test_what_is_scrubbed(query: str, why: str | None) -> None:
    assert Scrubber(common=frozenset({"garden", "of", "2006"}), hosts=frozenset()).reason(query) == why


@given(st.text(alphabet="0123456789 -", max_size=5), st.integers(10**5, 10**16))
@hypothesis_settings(max_examples=60, deadline=None)
def test_no_long_number_gets_through(around: str, number: int) -> None:
    assert Scrubber(common=frozenset(), hosts=frozenset()).reason(f"{around}{number}") in PATTERNS


def test_what_one_user_alone_typed_is_dropped(tmp_path: Path) -> None:
    rows = [row.replace("7\t", f"{user}\t", 1) for row in WALK for user in range(5)]
    rows += [f"0\tzyxwv garden\t2006-03-01 10:0{i}:10\t\t" for i in range(9)]  # many times, by one user
    rows += [f"0\tgarden shed\t2006-03-01 10:05:0{i}\t1\thttp://www.zyxwv-diary.example/p" for i in range(9)]
    sessions, dropped = convert(aol(tmp_path, rows), "aol", Rules(), min_users=5, key=KEY)
    assert len(sessions) == 5
    assert "zyxwv" not in json.dumps([[list(s.history["search"]), list(s.next_queries)] for s in sessions])
    assert "zyxwv" not in json.dumps([list(s.history["click"]) for s in sessions])
    assert dropped["queries with a word of few users"] == dropped["clicks on a site of few users"] == 9
    assert sessions[0].history["click"] == ("www.sheds.example", "other.example")  # hosts alone


def test_the_sessions_of_a_user_are_one_user(tmp_path: Path) -> None:
    path = tmp_path / "s.xml"
    query = "<interaction><query>{}</query></interaction>"
    common = "".join(f'<session userid="u{n}">{query.format("bees") * 2}</session>' for n in range(5))
    rare = f'<session userid="a">{query.format("bees")}{query.format("zyxwv bees")}</session>' * 5
    path.write_text(f"<sessiontrack2014>{common}{rare}</sessiontrack2014>")
    with pytest.raises(UserError, match="5 queries with a word of few users"):
        convert(path, "trec", ONE, min_users=5, key=KEY)


def test_times_with_zones_are_put_in_order_as_utc(tmp_path: Path) -> None:
    """What a clock on the wall says is not the order of events."""
    times = {"a": "10:00+02:00", "b": "08:05Z", "c": "10:10+02:00", "d": "08:15Z"}
    rows = [f"7\t{query}\t2006-03-01T{time}" for query, time in times.items()]
    (session,), _ = convert(aol(tmp_path, rows), "aol", ONE, min_users=None, key=KEY)
    assert (session.history["search"], session.next_queries) == (("a", "b", "c"), ("d",))


def test_trec_session_track(tmp_path: Path) -> None:
    path = tmp_path / "s.xml"
    path.write_text(
        """<sessiontrack2014><session num="3" userid="a"><interaction num="1"><query>bees</query>
        <results><result rank="1"><url>http://bees.example</url></result></results>
        <clicked><click num="1"><rank>1</rank></click></clicked></interaction>
        <interaction num="2"><query>bees hives</query></interaction>
        <currentquery><query>bees hives price</query></currentquery></session></sessiontrack2014>"""
    )
    (session,), _ = convert(path, "trec", ONE, min_users=None, key=KEY)
    assert session.history == {"search": ("bees", "bees hives"), "click": ("http://bees.example",)}
    assert session.next_queries == ("bees hives price",)
    path.write_text('<!DOCTYPE x [<!ENTITY a "b">]><session/>')
    with pytest.raises(UserError, match="entities"):
        convert(path, "trec", ONE, min_users=None, key=KEY)


def test_sim4ia(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(
        'session_id,query,date,serp\n3,tea,2025-01-10 00:09:56,"[1, 2]"\n3,"green ""tea""",2025-01-10 01:13:25,[]\n'
    )
    (session,), _ = convert(path, "sim4ia", ONE, min_users=None, key=KEY)
    assert (session.history["search"], session.next_queries) == (("tea",), ('green "tea"',))


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("aol", "7 garden", "line 1: 1 tab-separated columns: give an AOL log, with a tab between AnonID, Query"),
        ("aol", "7\tgarden\tnoon", "'noon' is not a date"),
        ("aol", "7\ta\t0001-01-01T00:00+01:00", r"time '0001-01-01T00:00\+01:00' is not a date"),
        (
            "aol",
            "7\ta\t2006-03-01T10:00\n7\tb\t2006-03-01T10:00Z",
            "line 2: time '2006-03-01T10:00Z' has a zone, and the times before it have none: give all or none a zone",
        ),
        (
            "jsonl",
            '{"user_id": "3", "query": "a", "time": "2006-03-01T10:00Z"}\n'
            '{"user_id": "3", "query": "a", "time": "2006-03-01"}',
            "line 2: time '2006-03-01' has no zone, and the times",
        ),
        ("aol", "", r"log\.jsonl' holds no query: give a log with at least one$"),
        ("aol", "7\tgarden\t2006-03-01", r"no session is left \(1 sessions that are too short\); loosen the rules"),
        ("trec", "<session>", "not well-formed"),
        ("trec", "<a/>", "holds no <session>"),
        ("sim4ia", "a,b\n1,2", "no column 'date'"),
        (
            "sim4ia",
            f"session_id,query,date\n1,{'a' * 131_073},2025-01-10",
            "after line 1: field larger than field limit",
        ),
        ("jsonl", '{"user_id": 3, "query": "a", "time": "2006-03-01"}', "user_id = 3"),
        ("jsonl", '{"user_id": "3", "query": "a", "time": "x"}', "'x' is not a date"),
        ("jsonl", '{"user_id": " ", "query": "a", "time": "2006-03-01"}', "user_id = ' ' is blank, and would make one"),
    ],
)
def test_bad_logs_are_one_sentence(tmp_path: Path, kind: str, text: str, said: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        convert(path, kind, Rules(), min_users=None, key=KEY)
    assert "\n" not in str(caught.value)


def test_a_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress("\n".join(WALK).encode()))
    whole[12] ^= 0xFF  # in the compressed body
    (tmp_path / "log.txt.gz").write_bytes(whole)
    with pytest.raises(UserError, match="not a whole gzip file"):
        convert(tmp_path / "log.txt.gz", "aol", Rules(), min_users=None, key=KEY)


def test_a_query_may_hold_what_python_calls_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes("7\tgarden\u2028shed\t2006-03-01\r\n7\troses\x85red\t2006-03-02\r\n".encode())
    (session,), _ = convert(path, "aol", ONE, min_users=None, key=KEY)
    assert (session.history["search"], session.next_queries) == (("garden shed",), ("roses red",))


def test_a_pause_longer_than_any_log_is_refused(tmp_path: Path) -> None:
    words = ["convert", "log.txt", "--format", "aol", "--out", str(tmp_path / "s.jsonl"), "--gap", "99999999999999"]
    done = CliRunner().invoke(cli.cli, words)
    assert done.exit_code == 2
    assert "--gap" in done.output


def test_the_command(tmp_path: Path) -> None:
    rows = [row.replace("7\t", f"{user}\t", 1) for row in WALK for user in range(5)]
    out = tmp_path / "sessions.jsonl"
    words = ["convert", str(aol(tmp_path, rows)), "--format", "aol", "--out", str(out)]
    done = CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "5 sessions of 5 users" in done.output
    assert "dropped 5 sessions that are too short" in done.output
    assert len(read_sessions(out)) == 5


@pytest.mark.parametrize("name", ["log.jsonl", "link.jsonl", "hard.jsonl"])
def test_a_log_is_never_converted_onto_itself(tmp_path: Path, name: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("not even read")
    (tmp_path / "link.jsonl").symlink_to(log)
    (tmp_path / "hard.jsonl").hardlink_to(log)
    words = ["convert", str(log), "--format", "jsonl", "--out", str(tmp_path / name), "--fresh"]
    with pytest.raises(UserError, match=rf"--out '.*{name}' is a file to be read, and would be lost"):
        CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    assert log.read_text() == "not even read"


def test_sessions_that_are_there_are_replaced_by_fresh_alone(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    out.write_text("mine")
    words = ["convert", str(aol(tmp_path, WALK)), "--format", "aol", "--no-scrub", "--out", str(out)]
    with pytest.raises(UserError, match="is there already: choose another name, or use --fresh to replace it"):
        CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    assert out.read_text() == "mine"
    assert CliRunner().invoke(cli.cli, [*words, "--fresh"], catch_exceptions=False).exit_code == 0
    assert len(read_sessions(out)) == 1


def test_a_log_in_another_encoding_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(WALK[0].encode("utf-16"))
    with pytest.raises(UserError, match=r"byte b'\\xff' at position 0 is not UTF-8: save the file as UTF-8"):
        convert(tmp_path / "log.txt", "aol", Rules(), min_users=None, key=KEY)
    (tmp_path / "log.txt").write_bytes("7\ttea\t2006-03-01\n7\tcaf\xe9\t2006-03-01".encode("latin-1"))
    with pytest.raises(UserError, match=r"log.txt' line 2: byte b'\\xe9' at position 5 is not UTF-8"):
        convert(tmp_path / "log.txt", "aol", Rules(), min_users=None, key=KEY)


def test_a_log_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small archive may unpack to any size: what is held is one line, and of the log only what it says."""
    path = tmp_path / "log.txt.gz"
    row = "7\tgarden shed\t2006-03-01 10:00:00\t1\thttp://www.sheds.example\n"
    path.write_bytes(gzip.compress((row * 20_000).encode()))
    tracemalloc.start()
    try:
        users = list(READERS["aol"](path))
        held = tracemalloc.get_traced_memory()[1] / 20_000
    finally:
        tracemalloc.stop()
    assert len(users[0][1]) == 20_000
    assert held < 150  # bytes for a line, at most; the whole text and a tuple for each line were 430
    monkeypatch.setattr(files, "LONGEST_LINE", 50)
    with pytest.raises(UserError, match="line 1 has more than 50 bytes: break it into lines"):
        convert(path, "aol", Rules(), min_users=None, key=KEY)


def test_a_log_of_json_lines_may_have_any_suffix_but_be_no_folder(tmp_path: Path) -> None:
    for minute, query in enumerate(("a", "b")):
        with (tmp_path / "log.txt").open("a") as file:
            file.write(json.dumps({"user_id": "7", "query": query, "time": f"2006-03-01 10:0{minute}"}) + "\n")
    assert len(convert(tmp_path / "log.txt", "jsonl", ONE, min_users=None, key=KEY)[0]) == 1
    with pytest.raises(UserError, match="Is a directory"):
        convert(tmp_path, "jsonl", ONE, min_users=None, key=KEY)
