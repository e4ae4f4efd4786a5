"""The first process of a run that is shared: it starts the others, tells them what to do, and hears what became of it."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tppo_fast import child
from tppo_fast.config import Config
from tppo_fast.data_types import RolloutBatch
from tppo_fast.errors import EngineError, ProcessFailed, TrainingDiverged, UserError
from tppo_fast.ppo import PPO
from tppo_fast.team import Team

START_TIMEOUT = 300.0
"""Seconds until a process must listen: it loads torch first."""
REASON_TIMEOUT = 5.0
"""Seconds until a process that failed has said why."""
LEARN, SAMPLE = 0, 1
"""The connections to a process: with ``rollout.staleness`` it learns and samples at the same time."""


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
        self._device, self._config = device, config
        self._folder = Path(tempfile.mkdtemp(prefix="tppo-fast-"))
        self._told = {
            "config": config.model_dump(mode="json", exclude_unset=True),  # a default is not a choice
            "start_from": None if start_from is None else str(start_from.absolute()),
            "meeting": str(self._folder / "meeting"),
            "path": sys.path,
        }
        self._followers: list[child.Child] = []  # of rank 1, 2, ...
        self._asked: Counter[tuple[int, int]] = Counter()  # requests, by rank and connection
        self._hearing = ThreadPoolExecutor(1, thread_name_prefix="followers")
        self._failures: list[UserError | ProcessFailed] = []

    def __enter__(self) -> Leader:
        try:
            for rank in range(1, self.size):
                environment = {**os.environ, **self._own_part(rank)}
                named = f"process {rank + 1} of {self.size}"
                told = {**self._told, "rank": rank}
                self._followers.append(child.spawn("tppo_fast.follow", told, name=named, environment=environment))
            for follower in self._followers:
                follower.connect(START_TIMEOUT, connections=2)
            self._tell(LEARN, "build")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _own_part(self, rank: int) -> dict[str, str]:
        """The variables that give a process its part of the machine."""
        own = {}
        if self._config.threads:
            own["OMP_NUM_THREADS"] = str(self._config.threads)
        if self._device.type == "cuda":
            own["CUDA_VISIBLE_DEVICES"] = _others_gpu(rank)
        return own

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def end(self) -> None:
        """End the other processes, whatever they are at."""
        for follower in self._followers:
            follower.process.kill()
        for follower in self._followers:
            follower.process.wait()
        self._hearing.shutdown()  # it has heard that they are gone
        for follower in self._followers:
            follower.end()
        self.abort()

    def meet(self, ppo: PPO) -> None:
        """Wait until the others have built their parts, and form the group with them.

        Raises:
            UserError, ProcessFailed: one could not, or has other weights.
        """
        for rank in range(1, self.size):
            self.answer(rank, LEARN, "build")
        with self.doing("join"):
            self.join(self._device, self._folder / "meeting")
            ppo.meet()

    # ---------------------------------------------------------------- learning

    @contextlib.contextmanager
    def doing(self, operation: str, batch: RolloutBatch | None = None) -> Iterator[None]:
        """See ``Team.doing``. When it fails, here or elsewhere, the other processes are ended.

        Raises:
            UserError: one of the others says so.
            ProcessFailed: one of the others failed or is gone.
        """
        tensors = None if batch is None else {f.name: getattr(batch, f.name) for f in fields(batch)}
        self._tell(LEARN, operation, tensors)
        heard = self._hearing.submit(self._hear, operation)
        try:
            yield
            heard.result()
        except BaseException as error:
            of_a_sum = isinstance(error, RuntimeError) and not isinstance(error, (EngineError, TrainingDiverged))
            if of_a_sum:
                wait([heard], REASON_TIMEOUT)  # it fails when another process is gone
            reasons = list(self._failures) if of_a_sum else []
            self.end()
            if reasons:
                raise _worst(reasons) from error
            raise
        if self._failures:
            self.end()
            raise _worst(self._failures)

    def _hear(self, operation: str) -> None:
        """Every follower's answer, as it comes; the first failure ends the sums that wait for it."""
        waiting = {follower.connections[LEARN]: rank for rank, follower in enumerate(self._followers, 1)}
        while waiting:
            for ready in multiprocessing.connection.wait(list(waiting)):
                rank = waiting.pop(ready)  # type: ignore[arg-type]
                try:
                    self.answer(rank, LEARN, operation)
                except (UserError, ProcessFailed) as error:
                    self._failures.append(error)
                    self.abort()

    # ---------------------------------------------------------------- what is said

    def _tell(
        self, connection: int, operation: str, tensors: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        for rank in range(1, self.size):
            self.ask(rank, connection, operation, tensors, **arguments)

    def ask(
        self, rank: int, connection: int, operation: str, tensors: dict[str, Tensor] | None = None, **arguments: Any
    ) -> None:
        """Ask one process; it answers when ``answer`` is called."""
        self._asked[rank, connection] += 1
        header = {"id": self._asked[rank, connection], "operation": operation, "arguments": arguments}
        try:
            child.send(self._followers[rank - 1].connections[connection], header, tensors)
        except OSError:
            raise self._gone(rank, operation) from None

    def answer(self, rank: int, connection: int, operation: str) -> tuple[Any, dict[str, Tensor]]:
        """What one process answers to the last question: a JSON value, and tensors.

        Raises:
            UserError: it says so.
            ProcessFailed: it failed or is gone.
        """
        follower = self._followers[rank - 1]
        reply, tensors = {"id": 0}, {}
        while reply["id"] < self._asked[rank, connection]:  # of an earlier one nobody has waited for the answer
            try:
                reply, tensors = child.receive(follower.connections[connection])
            except (EOFError, OSError):
                raise self._gone(rank, operation) from None
        if "user_error" in reply:
            raise UserError(f"{reply['user_error']} (in {follower.name})")
        if "error" in reply:
            raise ProcessFailed(f"{operation} failed in {follower.name}: {reply['error']}")
        return reply["result"], tensors

    def _gone(self, rank: int, operation: str) -> ProcessFailed:
        follower = self._followers[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            follower.process.wait(REASON_TIMEOUT)
        return ProcessFailed(
            f"{follower.name} ended during {operation} (exit code {follower.process.returncode}): look at what it wrote to stderr"
        )

    @contextlib.contextmanager
    def all(self, connection: int, operation: str, **arguments: Any) -> Iterator[None]:
        """The others do ``operation`` beside the block."""
        self._tell(connection, operation, **arguments)
        yield
        for rank in range(1, self.size):
            self.answer(rank, connection, operation)


def _worst(failures: Sequence[UserError | ProcessFailed]) -> UserError | ProcessFailed:
    """What is said of several: a process whose sum failed because another was gone has nothing to add to a UserError."""
    refused = [failure for failure in failures if isinstance(failure, UserError)]
    return refused[0] if refused else ProcessFailed("; ".join(map(str, failures)))


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
