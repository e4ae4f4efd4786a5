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
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def send(connection: Connection, header: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """One message: a header that says whether tensors follow, and the tensors."""
    connection.send_bytes(json.dumps({**header, "tensors": tensors is not None}).encode())
    if tensors is not None:
        connection.send_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def receive(connection: Connection) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(connection.recv_bytes())
    return header, load(connection.recv_bytes()) if header["tensors"] else {}


# -------------------------------------------------------------------- the parent's side


def start(
    module: str,
    told: Mapping[str, Any],
    *,
    name: str,
    environment: Mapping[str, str],
    timeout: float,
    connections: int = 1,
) -> tuple[subprocess.Popen[bytes], list[Connection]]:
    """A process that runs ``module``, and so many connections to it.

    Args:
        module: ends up in ``Parent``.
        told: what its ``Parent.told`` will be.
        name: of the process, for what is said when it fails.
        environment: of the process.
        timeout: seconds until it must listen.
        connections: how many to open.

    Raises:
        UserError: it refused to start.
        EngineLost: it ended, or did not start in time.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment)
    )
    opened: list[Connection] = []
    try:
        key = secrets.token_bytes(32)
        port = _port(process, {**told, "key": key.hex()}, name, timeout)
        for _ in range(connections):
            with killed_after(process, timeout):
                opened.append(Client(("127.0.0.1", port), authkey=key))  # type: ignore[arg-type]
    except (EOFError, OSError, AuthenticationError) as error:
        end(process, opened)
        raise EngineLost(f"{name} did not answer when it had started ({type(error).__name__})") from None
    except BaseException:
        end(process, opened)
        raise
    return process, opened


def _port(process: subprocess.Popen[bytes], told: Mapping[str, Any], name: str, timeout: float) -> int:
    """Where it listens."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; the empty answer says so
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.close()
    if not select.select([process.stdout], [], [], timeout)[0]:
        raise EngineLost(f"{name} did not start within {timeout:g} s")
    line = process.stdout.readline()
    answer = json.loads(line) if line.strip() else {}
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "port" not in answer:
        raise EngineLost(f"{name} ended with exit code {process.wait()} while it started")
    return answer["port"]


@contextlib.contextmanager
def killed_after(process: subprocess.Popen[bytes], timeout: float) -> Iterator[None]:
    """Kill a process that does not take in what is sent to it within the timeout; a blocked write then fails."""
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end(process: subprocess.Popen[bytes], connections: Sequence[Connection]) -> None:
    """End a process, whatever state it is in."""
    for connection in connections:
        connection.close()
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


# -------------------------------------------------------------------- the child's side


class Parent:
    """Whoever started this process. Ctrl-C, SIGTERM and SIGHUP are the parent's to handle, though all its processes are told."""

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
            reply["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        send(connection, reply, sent)
        if until_failed and "result" not in reply:
            return
