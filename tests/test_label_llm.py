"""The LLM judge against an endpoint that answers garbage, too late, 429 or not at all: nothing is lost or made up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from endpoint import Reply, good, serve

from tppo_fast import cli
from tppo_fast.errors import LabellingFailed, UserError
from tppo_fast.labelling import read_labels
from tppo_fast.labelling.judges import Item, Rejected
from tppo_fast.labelling.llm import KEY, LLMJudge, LLMSettings, RateLimiter
from tppo_fast.labelling.prompting import load_template
from tppo_fast.rewards.labels import Labels

pytest.importorskip("openai", reason="the official client is not installed (make test installs it)")
ITEM = Item(history=("lisbon",), next_queries=("lisbon tram map",), response=" lisbon map, lisbon rome")
TOKEN = load_template("token")


class judge(LLMJudge):
    """A judge that is closed with its test."""

    opened: ClassVar[list[LLMJudge]] = []

    def __init__(self, url: str | None, **changes: Any) -> None:
        own = {"model": "m", "base_url": url, "timeout": 5.0, "retries": 3, **changes}
        super().__init__(LLMSettings(**own), TOKEN)
        self.opened.append(self)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while judge.opened:
        judge.opened.pop().close()


def inputs(folder: Path, count: int = 8) -> list[str]:
    """Session and response files with ``count`` distinct responses, the first of them twice and an empty one."""
    session = {"user_id": "u1", "history": {"search": ["lisbon"]}, "next_queries": ["lisbon tram map"]}
    (folder / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    texts = [*(f" lisbon map {n}, lisbon rome" for n in range(count)), " lisbon map 0, lisbon rome", ""]
    rows = [json.dumps({"session": 1, "user_id": "u1", "response": text}) for text in texts]
    (folder / "responses.jsonl").write_text("\n".join(rows) + "\n")
    return ["label", str(folder / "sessions.jsonl"), "--responses", str(folder / "responses.jsonl")]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.run(lambda: cli.cli(list(arguments), standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def label(folder: Path, url: str, *more: str) -> list[str]:
    own = ["--labeller", "llm", "--model", "m", "--base-url", url, "--out", str(folder / "labels.jsonl")]
    return [*inputs(folder), *own, *more]


def test_a_good_answer_is_used_and_the_request_holds_the_schema() -> None:
    with serve() as endpoint:
        labels = judge(endpoint.url)(ITEM.history, ITEM.next_queries, ITEM.response)
    (request,) = endpoint.requests
    assert request["response_format"]["json_schema"]["strict"] is True
    assert request["temperature"] == 0.0
    assert request["max_completion_tokens"] == 64 + 12 * 4
    assert len(labels.classes) == 5


def is_example(request: dict[str, Any]) -> bool:
    """Whether it is what ``check`` asks."""
    return 'Response: "lisbon map"' in request["messages"][1]["content"]


GARBAGE = {
    "prose": Reply(content="I think it is fine"),
    "truncated": Reply(content='{"words": {"1": 1', finish="length"),
    "wrong count": Reply(content='{"words": {"1": 1}, "sentence": 0}'),
    "empty": Reply(content=""),
    "parts": Reply(body=b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}'),
    "half a pair": Reply(content="\ud800"),
    "bad request": Reply(status=400, body=b'{"error": {"message": "context too long"}}'),
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_asked_again_and_then_set_aside_with_the_reason(reply: Reply) -> None:
    with serve(lambda request, n: reply if n < 2 else good(request)) as endpoint:
        assert isinstance(judge(endpoint.url).judge([ITEM])[0], Labels)
    assert len(endpoint.requests) == 3
    first, again = (endpoint.requests[i]["messages"] for i in (0, 1))
    if reply.content:
        assert "cannot be used" in again[-1]["content"]
        assert again[-2]["role"] == "assistant"
    assert again[: len(first)] == first
    assert all(message["content"] for message in again)
    with serve(lambda request, _: good(request) if is_example(request) else reply) as endpoint:
        (outcome,) = judge(endpoint.url).judge([ITEM])
    assert isinstance(outcome, Rejected)
    assert outcome.reason
    assert len(endpoint.requests) == 3 + (reply.status == 400)  # is it the response that is refused, or everything?


NO_COMPLETION = {
    "no choices": Reply(body=b'{"id": "x", "object": "chat.completion", "choices": []}'),
    "null choice": Reply(body=b'{"choices": [null]}'),
    "no message": Reply(body=b'{"choices": [{"message": null}]}'),
    "html": Reply(body=b"<html>proxy</html>", headers={"Content-Type": "text/html"}),
    "broken json": Reply(body=b'{"id": "x", "choi'),
    "error": Reply(body=b'{"error": {"code": 429, "message": "slow down"}}'),
    "nothing": Reply(body=b""),
}


@pytest.mark.parametrize("reply", NO_COMPLETION.values(), ids=NO_COMPLETION.keys())
def test_what_is_no_completion_is_the_endpoints_failure_and_not_the_responses(
    reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(RateLimiter, "pause", lambda _, seconds: pauses.append(seconds))
    usage = b'{"choices": [{"message": {"content": "{}"}}], "usage": {"prompt_tokens": "many"}}'
    with serve(lambda request, n: [reply, Reply(body=usage), good(request)][n]) as endpoint:
        assert isinstance(judge(endpoint.url).judge([ITEM])[0], Labels)
    assert endpoint.requests[1]["messages"] == endpoint.requests[0]["messages"]
    assert pauses == [0.5]
    with serve(lambda *_: reply) as endpoint:
        one = judge(endpoint.url, attempts=2)
        with pytest.raises(LabellingFailed, match="failed") as e:
            one.judge([ITEM])
        assert not e.value.final
        with pytest.raises(LabellingFailed) as e:
            one.check()
        assert e.value.final


FAILURES = {
    "429": Reply(status=429, body=b"{}", headers={"Retry-After": "0.3"}),
    "503": Reply(status=503, body=b"busy"),
    "dropped": Reply(drop=True),
    "timeout": Reply(delay=1.0),
}


@pytest.mark.parametrize("reply", FAILURES.values(), ids=FAILURES.keys())
def test_failures_on_the_way_are_repeated(reply: Reply) -> None:
    with serve(lambda request, n: reply if n < 1 else good(request)) as endpoint:
        assert isinstance(judge(endpoint.url, timeout=0.5).judge([ITEM])[0], Labels)
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_that_nobody_would_sit_through_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    later = Reply(status=status, body=b"{}", headers={"Retry-After": "10800"})
    with serve(lambda request, n: later if n else good(request)) as endpoint:
        began = time.monotonic()
        code, said = run(capsys, *label(tmp_path, endpoint.url, "--concurrency", "1"))
        assert time.monotonic() - began < 30.0
        assert len(endpoint.requests) == 2
    assert code == 1
    assert "asks to wait 180 minutes (Retry-After): start again then; 0 of 9 are done and saved" in said


def test_who_is_told_to_wait_waits_for_all() -> None:
    first = threading.Event()

    def script(request: dict[str, Any], n: int) -> Reply:
        if n == 0:
            first.set()
            return Reply(status=429, body=b"{}", headers={"Retry-After": "0.8"})
        return good(request)

    with serve(script) as endpoint:
        one = judge(endpoint.url)
        thread = threading.Thread(target=one.judge, args=([ITEM],))
        thread.start()
        first.wait()
        time.sleep(0.2)  # the refusal has arrived
        one.judge([ITEM])
        thread.join()
    assert endpoint.times[1] - endpoint.times[0] > 0.7


def test_one_stubborn_response_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(request: dict[str, Any], _: int) -> Reply:
        return Reply(content="?") if "map 3" in request["messages"][1]["content"] else good(request)

    with serve(script) as endpoint:
        code, said = run(capsys, *label(tmp_path, endpoint.url, "--concurrency", "3"))
        assert code == 0, said
        assert "estimate (4 characters a token): 8 requests" in said
        assert len(endpoint.requests) == 1 + 7 + 3  # the check, the distinct responses, three attempts at one
        assert endpoint.most_at_once <= 3
        assert len(read_labels(tmp_path / "labels.jsonl")) == 9
        record = json.loads((tmp_path / "labels.jsonl.record.json").read_text())
        assert record["endpoint"] == endpoint.url.removeprefix("http://")
        (reject,) = [json.loads(line) for line in (tmp_path / "labels.jsonl.rejects.jsonl").read_text().splitlines()]
        assert (reject["session"], reject["answer"]) == (1, "?")
        assert "not JSON" in reject["reason"]

        endpoint.script = good
        assert run(capsys, *label(tmp_path, endpoint.url))[0] == 0
        assert len(endpoint.requests) == 11  # a reject stays set aside, and there is nothing else to ask
        code, said = run(capsys, *label(tmp_path, endpoint.url, "--retry-rejects"))
        assert code == 0
        assert "8 labelled already" in said
        assert ": 1 requests" in said
        assert len(endpoint.requests) == 13
    assert len(read_labels(tmp_path / "labels.jsonl")) == 10
    assert not (tmp_path / "labels.jsonl.rejects.jsonl").exists()


def test_a_response_that_always_fails_costs_only_itself_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_large = Reply(status=413, body=b"{}")

    def script(request: dict[str, Any], _: int) -> Reply:
        return too_large if "map 3" in request["messages"][1]["content"] else good(request)

    with serve(script) as endpoint:
        for _ in range(2):
            code, said = run(capsys, *label(tmp_path, endpoint.url))
            assert code == 1
            assert "413" in said
            assert (
                "1 of the responses set aside could not be judged this time: the same command, without --fresh" in said
            )
            assert len(read_labels(tmp_path / "labels.jsonl")) == 9
            (reject,) = map(json.loads, (tmp_path / "labels.jsonl.rejects.jsonl").read_text().splitlines())
            assert reject["reason"].startswith("not judged yet: ")
        endpoint.script = good
        assert run(capsys, *label(tmp_path, endpoint.url))[0] == 0
    assert len(read_labels(tmp_path / "labels.jsonl")) == 10
    assert not (tmp_path / "labels.jsonl.rejects.jsonl").exists()


@pytest.mark.parametrize(
    ("reply", "said", "kept", "most"),
    [
        (
            Reply(content="```json {} ```"),
            "20 responses in a row had to be set aside, the last because the answer",
            19,
            100,
        ),
        (Reply(status=400, body=b'{"error": "no template"}'), "failed (BadRequest: Error code: 400", 0, 60),
    ],
    ids=["useless", "refuses everything"],
)
def test_a_judge_that_is_good_for_nothing_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply, said: str, kept: int, most: int
) -> None:
    """Only who answers the example sets responses aside for good."""
    with serve(lambda request, n: reply if n else good(request)) as endpoint:
        words = [*label(tmp_path, endpoint.url, "--concurrency", "2"), "--attempts", "2"]
        inputs(tmp_path, 100)
        code, printed = run(capsys, *words)
        assert code == 1
        assert said in printed
        assert f"{kept} of 101 are done and saved, the same command goes on" in printed
        assert len(endpoint.requests) < most
        endpoint.script = good
        assert run(capsys, *words, "--retry-rejects")[0] == 0
    assert len(read_labels(tmp_path / "labels.jsonl")) == 102


def test_a_typo_beside_fresh_destroys_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve() as endpoint:
        words = label(tmp_path, endpoint.url)
        assert run(capsys, *words)[0] == 0
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        typo = [word.replace("responses.jsonl", "respones.jsonl") for word in words]
        assert run(capsys, *typo, "--fresh")[0] == 2
        endpoint.script = lambda *_: Reply(status=401, body=b"{}")
        assert run(capsys, *words, "--fresh")[0] == 1
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        endpoint.script = good
        asked = len(endpoint.requests)
        assert run(capsys, *words, "--fresh", "--dry-run")[0] == 0
        for name in ("sessions.jsonl", "responses.jsonl"):
            code, said = run(capsys, *words[:-1], str(tmp_path / name), "--fresh")
            assert code == 2
            assert "would be lost: choose another name" in said
        (tmp_path / "notes.jsonl").write_text("mine")
        code, said = run(capsys, *words[:-1], str(tmp_path / "notes.jsonl"), "--fresh")
        assert code == 2
        assert "was not written by a labelling run" in said
        (tmp_path / "notes.jsonl").unlink()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert len(endpoint.requests) == asked
        assert run(capsys, *words, "--fresh")[0] == 0
        assert len(endpoint.requests) == asked + 9
        assert (tmp_path / "labels.jsonl").read_bytes() == before["labels.jsonl"]


def test_an_endpoint_that_dies_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down = Reply(status=500, body=b"{}")
    with serve(lambda request, n: good(request) if n < 4 else down) as endpoint:
        code, said = run(capsys, *label(tmp_path, endpoint.url, "--concurrency", "1", "--retries", "0"))
        assert code == 1
        assert "5 of the responses set aside could not be judged this time" in said
        assert len(read_labels(tmp_path / "labels.jsonl")) == 5
        words = label(tmp_path, endpoint.url)
        more = "".join(json.dumps({"session": 1, "user_id": "u1", "response": f" lisbon {n}"}) + "\n" for n in range(9))
        (tmp_path / "responses.jsonl").write_text((tmp_path / "responses.jsonl").read_text() + more)
        before = len(endpoint.requests)
        endpoint.script = lambda request, n: good(request) if n < before + 2 else down  # the check and one response
        code, said = run(capsys, *words, "--concurrency", "1", "--retries", "0")
        assert "5 of 18 are done and saved" in said  # six failures in a row: not every response is tried
        assert len(read_labels(tmp_path / "labels.jsonl")) == 5
        endpoint.script = good
        code, said = run(capsys, *label(tmp_path, endpoint.url))
        assert code == 0
        assert "5 labelled already" in said
    assert len(read_labels(tmp_path / "labels.jsonl")) == 10


def test_a_refused_key_stops_at_once_and_is_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    refusal = Reply(status=401, body=b'{"error": {"message": "bad key sk-secret-1"}}')
    with serve(lambda *_: refusal) as endpoint:
        code, said = run(capsys, *label(tmp_path, endpoint.url))
        assert code == 1
        assert "AuthenticationError" in said
        assert "sk-secret-1" not in said
        assert endpoint.requests[0]["authorization"] == "Bearer sk-secret-1"
        endpoint.script = lambda *_: Reply(content="my key is sk-secret-1")
        assert run(capsys, *label(tmp_path, endpoint.url))[0] == 0  # the empty response needs no judge
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert any("my key is ***" in text for text in written)
    assert not any("sk-secret-1" in text for text in written)


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY is not set"):
        LLMJudge(LLMSettings(model="m"), TOKEN)
    with pytest.raises(UserError, match="user name or password"):
        judge("http://me:secret@localhost/v1")
    for variable, url in ((None, "http://h/v1?api-key=secret-1"), ("OPENAI_BASE_URL", "http://me:secret-1@h")):
        with monkeypatch.context() as other:
            other.setenv(variable or "UNUSED", url)
            with pytest.raises(UserError, match=rf"{'.OPENAI_BASE_URL' if variable else '--base-url'} holds a") as e:
                judge(None if variable else url)
            assert "secret-1" not in str(e.value)
    with pytest.raises(UserError, match=r"--base-url 'http://\[' is no address \(.*\): write"):
        judge("http://[")
    with pytest.raises(UserError, match="start it with http"):
        judge("localhost:8000")
    with pytest.raises(UserError, match="separator = ' '"):
        judge("http://localhost:8000", separator=" ")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\N{RIGHT DOUBLE QUOTATION MARK}")
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY holds a character"):
        judge("http://localhost:8000")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY would go to gpu-7 unencrypted: use https://"):
        judge("http://gpu-7:8000/v1")
    monkeypatch.setenv("MY_KEY", "sk-2")
    for url, variable in (("https://gpu-7/v1", KEY), ("http://[::1]:8000/v1", KEY), ("http://gpu-7/v1", "MY_KEY")):
        judge(url, key_variable=variable)
    monkeypatch.delenv("OPENAI_API_KEY")
    judge("http://gpu-7:8000/v1")
    with (
        serve(lambda *_: Reply(status=404, body=b"{}")) as endpoint,
        pytest.raises(LabellingFailed, match="NotFound") as e,
    ):
        judge(endpoint.url).check()
    assert e.value.final


def test_where_and_with_which_key_the_official_client_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
        judge(None).check()
        assert endpoint.requests[0]["authorization"] == "Bearer sk-1"
        endpoint.script = lambda *_: Reply(status=401, body=b"{}")
        with pytest.raises(LabellingFailed, match=f"the endpoint {endpoint.url} failed"):
            judge(None).check()


def test_a_dry_run_asks_nothing(tmp_path: Path) -> None:
    with serve() as endpoint:
        done = CliRunner().invoke(cli.cli, label(tmp_path, endpoint.url, "--dry-run", "--price-prompt", "2"))
    assert done.exit_code == 0, done.output
    assert "by the given prices" in done.output
    assert not endpoint.requests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses.jsonl", "sessions.jsonl"]
