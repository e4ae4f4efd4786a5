"""Rollout workers forked from one process that has imported vLLM: its import is most of a worker's start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tppo_fast import child

FORKS = """
import os, signal, socket, sys
from tppo_fast.rollout import vllm_engine, worker
asked = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while (message := socket.recv_fds(asked, 1, 2))[0]:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asked.close()
        for theirs, own in zip(message[1], (0, 1)):
            os.dup2(theirs, own)
            os.close(theirs)
        worker.main()
        os._exit(0)
    for theirs in message[1]:
        os.close(theirs)
    asked.send(str(pid).encode())
"""


class Forked:
    """What ``RemoteLive`` uses of a process that it started."""

    def __init__(self, asks: socket.socket) -> None:
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        socket.send_fds(asks, [b"+"], [theirs_in, theirs_out])
        self.pid = int(asks.recv(20))
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(ours_in, "wb"), os.fdopen(ours_out, "rb")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.01)


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Until the end, ``RemoteLive`` starts its workers so, in place of ``child.start``'s process."""
    asks, asked = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", FORKS, str(asked.fileno())],
        pass_fds=[asked.fileno()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def start(command: list[str], **_: Any) -> Forked:
        assert command == [sys.executable, "-P", "-m", "tppo_fast.rollout.worker"]
        return Forked(asks)

    with asks, pytest.MonkeyPatch.context() as patch:
        asked.close()
        patch.setattr(child, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
        yield
    process.wait()
