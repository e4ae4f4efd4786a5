"""The LLM judge: any OpenAI-compatible chat endpoint, asked through the official client.

The client retries connections, timeouts, 408, 409, 429 and 5xx with exponential backoff and honours Retry-After up to two
minutes, a longer one ends the run; every HTTP request, retries included, passes the shared ``RateLimiter``. An answer that is
not what the schema asks for is asked again, with what was wrong, and then set aside. One that is no chat completion at all is
the endpoint's failure, not the response's: asked again after a pause, and in the next run; so is a request refused as bad while
the tiny example of the start is refused, too. A judge that sets aside one response after another is stopped. Not causal: the
judge sees the whole response at once.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from tppo_fast.errors import LabellingFailed, UserError
from tppo_fast.labelling.judges import Item, Rejected
from tppo_fast.labelling.prompting import QUOTING, MalformedAnswer, Message, PromptTemplate
from tppo_fast.rewards.labels import Labels
from tppo_fast.rewards.segment import check_separator, segment

OPENAI, KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
"""Where the official client asks, and with which key, unless told otherwise."""
PATIENCE = 120.0
"""Longest Retry-After, in seconds, that a run waits for."""
USELESS = 20
"""Responses set aside in a row after which the judge is taken to be of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMSettings:
    """How the endpoint is asked."""

    model: str
    """The model's name at the endpoint."""
    base_url: str | None = None
    """Where the endpoint is; None: $OPENAI_BASE_URL or, without it, OpenAI."""
    key_variable: str = KEY
    """Environment variable that holds the key. Other endpoints than OpenAI may need none; the default one's is not sent
    unencrypted to another machine."""
    response_format: str = "json_schema"
    """"json_schema" (answers are made to fit), "json_object" or "text", for endpoints that know less."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""
    separator: str = ", "
    """Text between the queries of a response."""
    timeout: float = 60.0
    """Seconds for one request."""
    retries: int = 5
    """How often the client repeats a request that failed on the way."""
    attempts: int = 3
    """How often a malformed answer is asked for in all."""
    requests_per_minute: float | None = None
    """Limit of the whole run; None sets none."""
    answer_tokens: int | None = None
    """Longest answer; None: 64 and 12 for every word, 0: no limit (for models that think first)."""


class NoCompletion(MalformedAnswer):
    """What came back is no chat completion."""


class BadRequest(MalformedAnswer):
    """The request was refused for what it says: the response may be too long, or the endpoint refuse whatever it is asked."""


class RateLimiter:
    """Spaces requests evenly over all threads, and holds all of them back when one was told to wait."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Return when the next request may go out."""
        while True:
            with self._lock:
                now = time.monotonic()
                left = self._next - now
                if left <= 0.0:
                    self._next = now + self._interval
                    return
            time.sleep(left)  # and look again: others went first, or all were told to wait

    def pause(self, seconds: float) -> None:
        """No request goes out for this long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


@dataclass(slots=True)
class Usage:
    """What the endpoint counted in this run."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, usage: Any) -> None:
        with self.lock:
            self.requests += 1
            self.prompt_tokens += _whole(getattr(usage, "prompt_tokens", 0))
            self.completion_tokens += _whole(getattr(usage, "completion_tokens", 0))


def _whole(value: Any) -> int:
    """The client does not check what an endpoint sends."""
    return value if isinstance(value, int) else 0


class LLMJudge:
    """A ``Judge`` and a ``Labeller``. Safe to call from several threads.

    Raises:
        UserError: the official client is not installed, no key, one that would travel unencrypted, or a base URL that holds one.
    """

    chunk = 1

    def __init__(self, settings: LLMSettings, template: PromptTemplate) -> None:
        check_separator(settings.separator)
        self.settings, self.template, self.usage = settings, template, Usage()
        self._url = _url(settings)
        self._key = _key(settings, self._url)
        _, _, self.endpoint = self._url.partition(
            "://"
        )  # for the record: the labels' identity is the model, wherever it is
        self._limiter = RateLimiter(settings.requests_per_minute)
        self._client = self._connect()
        self._aside, self._lock = 0, threading.Lock()  # responses set aside in a row
        self.identity: Mapping[str, Any] = {
            "labeller": "llm",
            "model": settings.model,
            "template": {"name": template.name, "version": template.version, "sha256": template.sha256},
            "quoting": QUOTING,
            "temperature": settings.temperature,
            "response_format": settings.response_format,
            "separator": settings.separator,
            "causal": False,
        }

    def _connect(self) -> Any:
        try:
            import openai  # imported here: it is an extra
        except ImportError:
            raise UserError("--labeller llm needs the official client: pip install 'tppo-fast[label]'") from None
        hooks = {"request": [lambda _: self._limiter.wait()], "response": [self._slow_down]}
        return openai.OpenAI(
            api_key=self._key or "none",  # the client insists on one
            base_url=self._url,
            timeout=self.settings.timeout,
            max_retries=self.settings.retries,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks, timeout=self.settings.timeout),
        )

    def _slow_down(self, response: Any) -> None:
        """One thread that is told to wait waits for all."""
        seconds = _retry_after(response)
        if seconds > PATIENCE:
            response.headers["x-should-retry"] = "false"  # what the client obeys
        elif seconds > 0.0:
            self._limiter.pause(seconds)

    def check(self, *, final: bool = True) -> None:
        """Ask one tiny example, so that a wrong address, key, model or setting stops the run before it begins.

        Raises:
            LabellingFailed: what the endpoint said.
        """
        item = Item(history=("lisbon",), next_queries=("lisbon tram map",), response="lisbon map")
        parts = segment(item.response, self.settings.separator)
        try:
            self._ask(self.template.messages(item, parts), len(parts.flat))
        except (NoCompletion, BadRequest) as error:
            raise LabellingFailed(self._said(error), final=final) from None
        except MalformedAnswer:
            pass  # the endpoint works; what the model is worth shows later

    def judge(self, items: Sequence[Item]) -> list[Labels | Rejected]:
        return [self._judge(item) for item in items]

    def __call__(self, history: Sequence[str], next_queries: Sequence[str], response_text: str, /) -> Labels:
        """The labels of one response.

        Raises:
            LabellingFailed: also for an answer that stays malformed.
        """
        outcome = self._judge(Item(history=tuple(history), next_queries=tuple(next_queries), response=response_text))
        if isinstance(outcome, Rejected):
            raise LabellingFailed(f"the judge gave no usable answer: {outcome.reason}")
        return outcome

    def _judge(self, item: Item) -> Labels | Rejected:
        parts = segment(item.response, self.settings.separator)
        count = len(parts.flat)
        if not count:
            return parts.labels([[] for _ in parts.words], 0)  # nothing to judge, nothing to pay
        asked = messages = self.template.messages(item, parts)
        reason = answer = ""
        last = None
        for attempt in range(self.settings.attempts):
            try:
                answer = self._ask(messages, count)
                labels = self.template.parse(answer, parts)
                self._aside = 0
                return labels
            except NoCompletion as error:
                last = error
                self._limiter.pause(0.5 * 2**attempt)
                continue
            except MalformedAnswer as error:
                last, reason, answer = error, str(error), getattr(error, "answer", answer)
            again = f"That answer cannot be used: {reason}. Answer the question again, with the JSON alone."
            turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
            messages = [*asked, *turns] if answer else asked  # some endpoints refuse an empty turn
        if isinstance(last, NoCompletion):
            raise LabellingFailed(self._said(last))
        if isinstance(last, BadRequest):
            self.check(final=False)  # who refuses the example refuses everything
        return self._set_aside(Rejected(reason=self._scrub(reason), answer=self._scrub(answer)))

    def _set_aside(self, rejected: Rejected) -> Rejected:
        """The same, unless there were too many in a row.

        Raises:
            LabellingFailed: there were.
        """
        with self._lock:
            self._aside += 1
            if self._aside < USELESS:
                return rejected
        raise LabellingFailed(
            f"{USELESS} responses in a row had to be set aside, the last because {rejected.reason}: look at --model, "
            "--response-format and --answer-tokens, and add --retry-rejects to judge those again",
            final=True,
        )

    def _ask(self, messages: list[Message], count: int) -> str:
        import openai

        try:
            completion = self._client.chat.completions.create(**self._request(messages, count))
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise LabellingFailed(self._said(error), final=True) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise BadRequest(str(error)) from None
        except openai.OpenAIError as error:
            seconds = _retry_after(error.response) if isinstance(error, openai.APIStatusError) else 0.0
            if seconds > PATIENCE:
                wait = f"asks to wait {seconds / 60:.0f} minutes (Retry-After)"
                raise LabellingFailed(f"the endpoint {self._url} {wait}: start again then", final=True) from None
            raise LabellingFailed(self._said(error)) from None
        except UnicodeEncodeError as error:
            raise MalformedAnswer(f"what is to be judged is no text that can be sent: {error}") from None
        except ValueError as error:  # a body that is not the JSON it says it is
            raise NoCompletion(f"it did not answer with JSON: {error}") from None
        choices = getattr(completion, "choices", None)
        if not isinstance(choices, list) or not choices or not getattr(choices[0], "message", None):
            raise NoCompletion(f"its answer holds no message: {completion}")
        self.usage.add(completion.usage)
        return _text_of(choices[0])

    def _request(self, messages: list[Message], count: int) -> dict[str, Any]:
        own = self.settings
        request: dict[str, Any] = {"model": own.model, "messages": messages, "temperature": own.temperature}
        limit = 64 + 12 * count if own.answer_tokens is None else own.answer_tokens
        if limit:
            request["max_completion_tokens"] = limit
        if own.response_format == "json_schema":
            schema = {"name": "labels", "strict": True, "schema": self.template.schema(count)}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif own.response_format == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _said(self, error: Exception) -> str:
        """An error of the client in one line."""
        kind = type(error).__name__
        return self._scrub(f"the endpoint {self._url} failed ({kind}: {error})")

    def _scrub(self, text: str) -> str:
        """Short enough to keep, and never with the key in it."""
        text = text if not self._key else text.replace(self._key, "***")
        return text if len(text) <= 2000 else text[:2000] + " ..."

    def close(self) -> None:
        self._client.close()


def _text_of(choice: Any) -> str:
    """The answer's text.

    Raises:
        MalformedAnswer: there is none, or it was cut off.
    """
    text = choice.message.content or ""
    if not isinstance(text, str):
        raise _malformed("the message's content is no text", str(text))
    text = text.encode(errors="backslashreplace").decode()  # half of a surrogate pair fits in no file and no request
    if getattr(choice.message, "refusal", None):
        raise _malformed("the model refused", str(choice.message.refusal))
    if choice.finish_reason == "length":
        raise _malformed("the answer was cut at its longest length (--answer-tokens)", text)
    if choice.finish_reason == "content_filter":
        raise _malformed("the endpoint's content filter cut the answer", text)
    return text


def _malformed(reason: str, answer: str) -> MalformedAnswer:
    error = MalformedAnswer(reason)
    error.answer = answer  # type: ignore[attr-defined]
    return error


def _retry_after(response: Any) -> float:
    """Seconds that a busy endpoint asks to wait, otherwise 0; a date is left to the client itself."""
    try:
        seconds = float(response.headers.get("retry-after", "0")) if response.status_code in (429, 503) else 0.0
    except ValueError:
        return 0.0
    return seconds if 0.0 < seconds < math.inf else 0.0


def _url(settings: LLMSettings) -> str:
    """The endpoint's address, with nothing secret in it."""
    name = "--base-url" if settings.base_url else "$OPENAI_BASE_URL"
    address = settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    try:
        url = urlsplit(address)
    except ValueError as error:
        raise UserError(f"{name} {address!r} is no address ({error}): write http(s)://HOST:PORT/v1") from None
    for part, found in (("user name or password", url.username or url.password), ("query (?...)", url.query)):
        if found:
            raise UserError(
                f"{name} holds a {part}: take it out, and put the key into ${settings.key_variable} instead"
            )
    if url.scheme not in ("http", "https"):
        raise UserError(f"{name} {address!r}: start it with http:// or https://")
    return address


def _key(settings: LLMSettings, address: str) -> str:
    """The key, empty without one."""
    name = settings.key_variable
    key, url = os.environ.get(name, "").strip(), urlsplit(address)
    if not key.isascii() or not key.isprintable():
        raise UserError(f"${name} holds a character that no header can carry: copy the key again")
    if not key and address == OPENAI:
        raise UserError(f"${name} is not set: put the endpoint's key there, or give --base-url")
    if key and name == KEY and url.scheme == "http" and not _is_this_machine(url.hostname):
        raise UserError(
            f"${name} would go to {url.hostname} unencrypted: use https://, or name another variable by --key-variable (with the "
            "key of that endpoint, or unset if it needs none)"
        )
    return key


def _is_this_machine(host: str | None) -> bool:
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"
