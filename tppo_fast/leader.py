"""The first process of a run that is shared: it starts the others, tells them what to do, and hears what became of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tppo_fast import child
from tppo_fast.config import Config
from tppo_fast.data_types import RolloutBatch
from tppo_fast.errors import EngineError, ProcessFailed, TrainingDiverged, UserError
from tppo_fast.team import Team

START_TIMEOUT = 300.0
"""Seconds until a process must listen: it loads torch first."""
REASON_TIMEOUT = 5.0
"""Seconds until a process that failed has said why."""
LEARN, SAMPLE = 0, 1
"""The connections to a process: with ``rollout.staleness`` it learns and samples at the same time."""


@dataclass(frozen=True, slots=True)
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    connections: list[Connection]


class Leader(Team):
    """``with Leader(config, start_from, device) as team``: ``processes`` - 1 others are started, and ended with the block."""

    def __init__(self, config: Config, start_from: Path | None, device: torch.device) -> None:
        """
        Args:
            config: of the run; its ``threads`` are those of each process.
            start_from: the checkpoint that it goes on from.
            device: of the leader.

        Raises:
            UserError: the run cannot be shared so.
        """
        super().__init__(0, config.processes)
        _check(config, device)
        self._device, self._start_from = device, start_from
        self._folder = Path(tempfile.mkdtemp(prefix="tppo-fast-"))
        self._followers: list[_Follower] = []
        self._config = config

    def __enter__(self) -> Leader:
        try:
            with ThreadPoolExecutor(self.size) as pool:
                starting = [pool.submit(self._start, rank) for rank in range(1, self.size)]
            self._followers.sort(key=lambda follower: follower.rank)
            for started in starting:
                started.result()
            self._tell(LEARN, "build")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        for follower in self._followers:
            child.end(follower.process, follower.connections)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, rank: int) -> None:
        environment = dict(os.environ)
        if self._config.threads:
            environment["OMP_NUM_THREADS"] = str(self._config.threads)
        if self._device.type == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = _others_gpu(rank)
        told = {
            "config": self._config.model_dump(mode="json", exclude_unset=True),  # a default is not a choice
            "start_from": None if self._start_from is None else str(self._start_from.absolute()),
            "meeting": str(self._folder / "meeting"),
            "rank": rank,
            "path": sys.path,
        }
        process, connections = child.start(
            "tppo_fast.follow", told, name=self._named(rank), environment=environment, timeout=START_TIMEOUT,
            connections=2,
        )  # fmt: skip
        self._followers.append(_Follower(rank, process, connections))

    def _named(self, rank: int) -> str:
        return f"process {rank + 1} of {self.size}"

    def meet(self) -> None:
        """Wait until the others have built their parts, and form the group with them."""
        self._answers(LEARN, "build")
        with self.doing("join"):
            self.join(self._device, self._folder / "meeting")

    # ---------------------------------------------------------------- learning

    @contextlib.contextmanager
    def doing(self, operation: str, batch: RolloutBatch | None = None) -> Iterator[None]:
        """See ``Team.doing``.

        Raises:
            ProcessFailed: one of the others failed or is gone.
        """
        tensors = None if batch is None else {f.name: getattr(batch, f.name) for f in fields(batch)}
        with self.all(LEARN, operation, tensors):
            try:
                yield
            except (EngineError, TrainingDiverged):
                raise
            except RuntimeError as error:  # a sum's, when another process is gone
                if reasons := self._reasons(operation):
                    raise ProcessFailed("; ".join(reasons)) from error
                raise

    def _reasons(self, operation: str) -> list[str]:
        """Of the processes that failed, why."""
        found = []
        for follower in self._followers:
            if follower.connections[LEARN].poll(REASON_TIMEOUT):
                try:
                    self.answer(follower.rank, LEARN, operation)
                except (ProcessFailed, UserError) as error:
                    found.append(str(error))
        return found

    # ---------------------------------------------------------------- what is said

    def _tell(
        self, connection: int, operation: str, tensors: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        for follower in self._followers:
            self.ask(follower.rank, connection, operation, tensors, **arguments)

    def ask(
        self, rank: int, connection: int, operation: str, tensors: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        """Ask one process; it answers when ``answer`` is called."""
        header = {"id": 0, "operation": operation, "arguments": arguments}
        try:
            child.send(self._followers[rank - 1].connections[connection], header, tensors)
        except OSError:
            raise self._gone(rank, operation) from None

    def answer(self, rank: int, connection: int, operation: str) -> tuple[Any, dict[str, Tensor]]:
        """What one process answers to ``operation``: a JSON value, and tensors.

        Raises:
            UserError: it says so.
            ProcessFailed: it failed or is gone.
        """
        try:
            reply, tensors = child.receive(self._followers[rank - 1].connections[connection])
        except (EOFError, OSError):
            raise self._gone(rank, operation) from None
        if "user_error" in reply:
            raise UserError(reply["user_error"])
        if "error" in reply:
            raise ProcessFailed(f"{operation} failed in {self._named(rank)}: {reply['error']}")
        return reply["result"], tensors

    def _gone(self, rank: int, operation: str) -> ProcessFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._followers[rank - 1].process.wait(REASON_TIMEOUT)
        code = self._followers[rank - 1].process.returncode
        return ProcessFailed(
            f"{self._named(rank)} ended during {operation} (exit code {code}): look at what it wrote to stderr"
        )

    @contextlib.contextmanager
    def all(
        self, connection: int, operation: str, tensors: dict[str, Tensor] | None = None, **arguments: Any
    ) -> Iterator[None]:
        """The others do ``operation`` beside the block."""
        self._tell(connection, operation, tensors, **arguments)
        yield
        self._answers(connection, operation)

    def _answers(self, connection: int, operation: str) -> None:
        for follower in self._followers:
            self.answer(follower.rank, connection, operation)


def _check(config: Config, device: torch.device) -> None:
    for name, value in (("ppo.loss", config.ppo.loss), ("rollout.engine", config.rollout.engine)):
        if value.startswith("__main__:"):
            raise UserError(
                f"{name} = {value!r} with processes = {config.processes}: the other processes do not have this script's "
                "__main__; put the function into a module of its own"
            )
    if device.type == "cuda" and config.processes > torch.cuda.device_count():
        raise UserError(
            f"processes = {config.processes}, but torch sees {torch.cuda.device_count()} GPUs: give at most that, one process "
            "for each"
        )


def _others_gpu(rank: int) -> str:
    """The GPU of process ``rank``, as CUDA_VISIBLE_DEVICES names it; the leader keeps the one that it uses."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    own = names.pop(torch.cuda.current_device())
    return [own, *names][rank]
