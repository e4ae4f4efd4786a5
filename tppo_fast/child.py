"""A process of ours on this machine, and how it is spoken to: authenticated TCP connections, JSON and safetensors, no pickle."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from tppo_fast.errors import EngineLost, UserError
from tppo_fast.interrupt import FROM_OUTSIDE

Answer = tuple[Any, dict[str, Tensor] | None]
"""(JSON value, tensors or None)."""
Operations = Mapping[str, Callable[[dict[str, Any]], Answer]]
"""name -> what a request does with its arguments; with tensors of the request, they are ``arguments["tensors"]``."""


def done(_: object) -> Answer:
    """The answer of an operation that returns nothing."""
    return None, None


def send(connection: Connection, header: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """One message: a header that says whether tensors follow, and the tensors."""
    connection.send_bytes(json.dumps({**header, "tensors": tensors is not None}).encode())
    if tensors is not None:
        connection.send_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def receive(connection: Connection) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(connection.recv_bytes())
    return header, load(connection.recv_bytes()) if header["tensors"] else {}


# -------------------------------------------------------------------- the parent's side


@dataclass(frozen=True, slots=True)
class Child:
    """A process, from when it is spawned to when it is ended."""

    process: subprocess.Popen[bytes]
    name: str
    """For what is said when it fails."""
    key: bytes
    connections: list[Connection] = field(default_factory=list)

    def connect(self, timeout: float, connections: int = 1) -> None:
        """Open so many connections, once it listens.

        Args:
            timeout: seconds until it must.
            connections: how many.

        Raises:
            UserError: it refused to start.
            EngineLost: it ended, or did not start in time.
        """
        port = self._port(timeout)
        try:
            for _ in range(connections):
                with self.killed_after(timeout):
                    self.connections.append(Client(("127.0.0.1", port), authkey=self.key))  # type: ignore[arg-type]
        except (EOFError, OSError, AuthenticationError) as error:
            raise EngineLost(f"{self.name} did not answer when it had started ({type(error).__name__})") from None

    def _port(self, timeout: float) -> int:
        """Where it listens."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise EngineLost(f"{self.name} did not start within {timeout:g} s")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line.strip() else {}
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "port" not in answer:
            raise EngineLost(f"{self.name} ended with exit code {self.process.wait()} while it started")
        return answer["port"]

    @contextlib.contextmanager
    def killed_after(self, timeout: float) -> Iterator[None]:
        """Kill a process that does not take in what is sent to it within the timeout; a blocked write then fails."""
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def end(self) -> None:
        """End the process, whatever state it is in."""
        for connection in self.connections:
            connection.close()
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def spawn(module: str, told: Mapping[str, Any], *, name: str, environment: Mapping[str, str]) -> Child:
    """A process that runs ``module``, which makes a ``Parent`` whose ``told`` is this one.

    It is not in this one's process group: what a terminal tells that is ours to handle.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment),
        process_group=0,
    )  # fmt: skip
    key = secrets.token_bytes(32)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once, which ``connect`` will find
        process.stdin.write(json.dumps({**told, "key": key.hex()}).encode() + b"\n")
        process.stdin.close()
    return Child(process, name, key)


# -------------------------------------------------------------------- the child's side


class Parent:
    """Whoever started this process. Ctrl-C, SIGTERM and SIGHUP are the parent's to handle, whoever else is told."""

    def __init__(self) -> None:
        for number in (signal.SIGINT, *FROM_OUTSIDE):
            signal.signal(number, signal.SIG_IGN)
        self.told: dict[str, Any] = json.loads(sys.stdin.readline())
        self._answer = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not be taken for the answer

    def refuse(self, error: UserError) -> None:
        """Say why this process cannot start."""
        print(json.dumps({"user_error": str(error)}), file=self._answer, flush=True)

    @contextlib.contextmanager
    def connected(self, connections: int = 1) -> Iterator[list[Connection]]:
        """What the parent opened. A parent that died meanwhile never does, and its process then ends."""
        with Listener(("127.0.0.1", 0), authkey=bytes.fromhex(self.told["key"])) as listener:
            print(json.dumps({"port": listener.address[1]}), file=self._answer, flush=True)
            self._answer.close()
            signal.alarm(60)  # seconds
            opened = [listener.accept() for _ in range(connections)]
            signal.alarm(0)
            yield opened


def serve(connection: Connection, known: Operations, *, until_failed: bool = False) -> None:
    """Answer until the other side is gone or, with ``until_failed``, until a request failed."""
    while True:
        try:
            header, received = receive(connection)
        except (EOFError, OSError):
            return
        reply: dict[str, Any] = {"id": header["id"]}
        sent: dict[str, Tensor] | None = None
        try:
            arguments = {**header["arguments"], "tensors": received} if received else header["arguments"]
            reply["result"], sent = known[header["operation"]](arguments)
        except UserError as error:
            reply["user_error"] = str(error)
        except Exception as error:  # the parent says it, with the request's name
            traceback.print_exc()
            reply["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        try:
            send(connection, reply, sent)
        except OSError:
            return
        if until_failed and "result" not in reply:
            return
