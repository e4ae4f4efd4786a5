"""Labelling that is killed: the same file as in one go, whatever the moment; and Ctrl-C keeps what was paid for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from endpoint import Endpoint, Reply, good, serve

from tppo_fast.errors import LabellingFailed, UserError
from tppo_fast.labelling import journal as journal_module
from tppo_fast.labelling import read_labels
from tppo_fast.labelling.journal import Journal, fill, read_journal

pytest.importorskip("openai", reason="the official client is not installed (make test installs it)")
KILLS = 4
RESPONSES = 3 * (KILLS + 2)


def slow(request: dict[str, Any], _: int) -> Reply:
    reply = good(request)
    reply.delay = 0.03
    return reply


def command(folder: Path, url: str, out: str) -> list[str]:
    sessions, responses = folder / "sessions.jsonl", folder / "responses.jsonl"
    if not sessions.exists():
        rows = [{"user_id": f"u{n}", "history": {"search": ["a"]}, "next_queries": ["b"]} for n in range(4)]
        sessions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = [{"session": n % 4 + 1, "user_id": f"u{n % 4}", "response": f" b {n}, c"} for n in range(RESPONSES)]
        responses.write_text("".join(json.dumps(row) + "\n" for row in answers))
    return [
        sys.executable, "-m", "tppo_fast", "label", str(sessions), "--responses", str(responses),
        "--labeller", "llm", "--model", "m", "--base-url", url, "--concurrency", "2", "--out", str(folder / out),
    ]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(endpoint: Endpoint, answered: int, process: subprocess.Popen[str]) -> None:
    while endpoint.answered < answered and process.poll() is None:
        time.sleep(0.002)


def test_killed_again_and_again_gives_the_same_file_as_once_through(tmp_path: Path) -> None:
    with serve(slow) as endpoint:
        for kill in range(KILLS):
            process = start(command(tmp_path, endpoint.url, "labels.jsonl"))
            wait_for(endpoint, endpoint.answered + 3 + kill % 2, process)  # the check is one of them
            time.sleep(0.001 * kill)  # another moment of the write each time
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.communicate()
            process.communicate()
            if kill == KILLS // 2:
                with (tmp_path / "labels.jsonl.journal").open("a") as journal:
                    journal.write('{"key": "torn')
        done = subprocess.run(
            command(tmp_path, endpoint.url, "labels.jsonl"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        asked = len(endpoint.requests)
        once = subprocess.run(
            command(tmp_path, endpoint.url, "once.jsonl"), capture_output=True, text=True, check=False
        )
        assert once.returncode == 0, once.stderr
    assert (tmp_path / "labels.jsonl").read_bytes() == (tmp_path / "once.jsonl").read_bytes()
    assert len(read_labels(tmp_path / "labels.jsonl")) == RESPONSES
    # a check for each start, every response once, and at most the requests under way at each kill again
    assert asked <= (KILLS + 1) + RESPONSES + 4 * KILLS


def test_ctrl_c_keeps_what_is_under_way(tmp_path: Path) -> None:
    with serve(slow) as endpoint:
        process = start(command(tmp_path, endpoint.url, "labels.jsonl"))
        wait_for(endpoint, 8, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "the same command goes on" in said
        assert len(read_journal(tmp_path / "labels.jsonl.journal")) == endpoint.answered - 1


def entries(numbers: Any) -> list[dict[str, Any]]:
    return [{"value": number} for number in numbers]


def test_a_chunk_is_always_worked_on_as_a_whole(tmp_path: Path) -> None:
    calls: list[list[int]] = []

    def work(numbers: Any) -> list[dict[str, Any]]:
        calls.append(list(numbers))
        return entries(numbers)

    keys = [f"k{n}" for n in range(5)]
    with Journal(tmp_path / "j") as journal:
        journal.append({"k3": {"value": "first"}})
        fill(journal, keys, work, chunk=2, concurrency=0, verb="work", unit="item")
        assert calls == [[0, 1], [2, 3], [4]]
        assert journal.entries["k3"] == {"value": "first"}
    assert list(read_journal(tmp_path / "j")) == ["k3", "k0", "k1", "k2", "k4"]


def test_a_journal_has_one_writer_and_no_strange_lines(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append({"a": {"value": 1}})
        with pytest.raises(UserError, match="another run"):
            Journal(tmp_path / "j")
    (tmp_path / "j").write_text('{"key": "a"}\nrubbish\n')
    with pytest.raises(UserError, match="line 2 is no journal entry"):
        Journal(tmp_path / "j")
    with pytest.raises(UserError, match="cannot be written"):
        Journal(tmp_path / "absent" / "j")


@pytest.mark.parametrize("concurrency", [0, 1, 4])
def test_a_bug_in_the_work_is_not_swallowed(tmp_path: Path, concurrency: int) -> None:
    def work(numbers: Any) -> list[dict[str, Any]]:
        return entries(numbers[0] / 0)

    with Journal(tmp_path / "j") as journal, pytest.raises(ZeroDivisionError):
        fill(journal, ["a", "b"], work, chunk=1, concurrency=concurrency, verb="work", unit="item")


def test_scattered_failures_cost_only_themselves_and_a_dead_endpoint_stops(tmp_path: Path) -> None:
    def work(numbers: Any) -> list[dict[str, Any]]:
        if numbers[0] % 3 == 0:
            raise LabellingFailed("the line is down")
        return entries(numbers)

    keys = [str(n) for n in range(30)]
    with Journal(tmp_path / "j") as journal:
        failed = fill(journal, keys, work, chunk=1, concurrency=2, verb="work", unit="item")
        assert failed == {str(n): "the line is down" for n in range(0, 30, 3)}
        assert len(journal.entries) == 20
        asked: list[int] = []

        def dead(numbers: Any) -> list[dict[str, Any]]:
            asked.append(numbers[0])
            raise LabellingFailed("refused", final=True)

        with pytest.raises(LabellingFailed, match="refused; 20 of 30 are done"):
            fill(journal, keys, dead, chunk=1, concurrency=1, verb="work", unit="item")
        assert len(asked) < 10


def test_what_is_under_way_when_the_run_stops_is_kept(tmp_path: Path) -> None:
    """A refusal stops the run, and answers to requests that were sent before it are paid for."""

    def work(numbers: Any) -> list[dict[str, Any]]:
        together.wait()
        if numbers[0] == 0:
            raise LabellingFailed("refused", final=True)
        time.sleep(0.3)
        return entries(numbers)

    together = threading.Barrier(3)
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(LabellingFailed, match="refused; 2 of 30 are done"):
            fill(journal, [str(n) for n in range(30)], work, chunk=1, concurrency=3, verb="work", unit="item")
        assert set(journal.entries) == {"1", "2"}
    with Journal(tmp_path / "j", fresh=True) as journal:
        assert not journal.entries
    assert (tmp_path / "j").read_bytes() == b""


def test_what_is_not_answered_in_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "GRACE", 0.2)
    never = threading.Event()

    def work(numbers: Any) -> list[dict[str, Any]]:
        if numbers[0] == 0:
            raise LabellingFailed("refused", final=True)
        never.wait(60)
        return entries(numbers)

    began = time.monotonic()
    with Journal(tmp_path / "j") as journal, pytest.raises(LabellingFailed, match="refused; 0 of 30 are done"):
        fill(journal, [str(n) for n in range(30)], work, chunk=1, concurrency=3, verb="work", unit="item")
    assert time.monotonic() - began < 10.0
    never.set()
