"""A chat endpoint that misbehaves as told, on the loopback, with the standard library alone."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(kw_only=True)
class Reply:
    """What the endpoint sends back."""

    status: int = 200
    content: str = ""
    """The chat message; for other bodies, ``body``."""
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay: float = 0.0
    drop: bool = False
    """Close the connection without an answer."""


Script = Callable[[dict[str, Any], int], Reply]
"""(request, how many came before it) -> reply."""


def good(request: dict[str, Any], _: int = 0) -> Reply:
    """Labels decided by the text alone, so that every run and every order of requests gives the same."""
    fields = request["response_format"]["json_schema"]["schema"]["properties"]
    text = request["messages"][1]["content"]
    words = {n: zlib.crc32(f"{text}{n}".encode()) & 1 for n in fields["words"]["required"]}
    return Reply(content=json.dumps({"words": words, "sentence": zlib.crc32(text.encode()) & 1}))


@dataclass
class Endpoint:
    """What came in."""

    url: str
    script: Script = good
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: int = 0
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(script: Script = good) -> Iterator[Endpoint]:
    """The endpoint, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                number = len(endpoint.requests)
                endpoint.requests.append({**request, "authorization": self.headers.get("Authorization")})
                endpoint.times.append(time.monotonic())
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                reply = endpoint.script(request, number)
                time.sleep(reply.delay)
                self._send(reply)
            except OSError:  # the client has gone
                self.close_connection = True
            finally:
                with endpoint.lock:
                    endpoint.at_once -= 1
                    endpoint.answered += 1

        def _send(self, reply: Reply) -> None:
            if reply.drop:
                self.close_connection = True
                return
            message = {"role": "assistant", "content": reply.content}
            choice = {"index": 0, "finish_reason": reply.finish, "message": message}
            usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            completion = {
                "id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage,
            }  # fmt: skip
            body = json.dumps(completion).encode() if reply.body is None else reply.body
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **reply.headers}
            self.send_response(reply.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
