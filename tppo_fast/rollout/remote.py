"""A live engine in a process of its own, and a rollout engine that survives the loss of its live one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from tppo_fast import child
from tppo_fast.child import receive, send
from tppo_fast.errors import EngineError, EngineLost, UserError
from tppo_fast.interrupt import InterruptGuard
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.bucket_file import bucket_file
from tppo_fast.rollout.publish import LiveEngine, LiveSettings, Policy, PublishedEngine

T = TypeVar("T")
UPDATING = {"start_update", "update", "finish_update"}
"""Operations after whose failure a worker may hold part of two policies, and is not used again."""


class RemoteLive:
    """``LiveEngine`` over an authenticated TCP connection to a worker process on this machine.

    Requests are answered one at a time and carry a number, which the answer repeats. Every request is a function of the
    weights and its own arguments, so that repeating it on a new worker with the same weights changes nothing.
    """

    def __init__(self, settings: LiveSettings, *, timeout: float) -> None:
        self._timeout = timeout
        self._in_place = settings.sleeps
        self._count = 0
        environment = dict(os.environ)
        if settings.device == "cuda":
            torch.cuda.empty_cache()  # another process sees what torch keeps for itself as taken
        if settings.threads:
            environment["OMP_NUM_THREADS"] = str(settings.threads)
        told = {"settings": settings.as_dict()}
        self._child = child.spawn("tppo_fast.rollout.worker", told, name="the rollout worker", environment=environment)
        try:
            self._child.connect(timeout)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.process.pid

    @property
    def alive(self) -> bool:
        return any(not connection.closed for connection in self._child.connections)

    # ---------------------------------------------------------------- requests

    def _ask(self, operation: str, **arguments: Any) -> Any:
        """Raises EngineLost where the worker died or took too long, EngineError where it failed."""
        self._count += 1
        request = f"{operation} (request {self._count})"
        if not self.alive:
            raise EngineLost(f"{request}: the rollout worker is closed")
        (connection,) = self._child.connections
        try:
            with self._child.killed_after(self._timeout):
                send(connection, {"id": self._count, "operation": operation, "arguments": arguments})
            self._sent(operation)
            if not connection.poll(self._timeout):
                raise EngineLost(f"{request} was not answered within {self._timeout:g} s")
            reply, received = receive(connection)
        except (EOFError, OSError) as error:
            raise EngineLost(
                f"the rollout worker died during {request}, or took in nothing for {self._timeout:g} s ({type(error).__name__})"
            ) from None
        if reply["id"] != self._count:
            raise EngineLost(f"{request} got the answer of request {reply['id']}")
        if "user_error" in reply:
            raise UserError(reply["user_error"])
        if "error" in reply:
            kind = EngineLost if operation in UPDATING else EngineError
            raise kind(f"{request} failed in the rollout worker: {reply['error']}")
        return received if reply["tensors"] else reply["result"]

    def _sent(self, operation: str) -> None:
        """A request is on its way: a place for tests to kill the worker."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, stop: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        asked = self._ask("generate", prompts=[list(p) for p in prompts], sampling=asdict(sampling), stop=list(stop))
        return [(tokens, logprobs) for tokens, logprobs in asked]

    def probe(self, token_ids: Sequence[int]) -> Tensor:
        return self._ask("probe", token_ids=list(token_ids))["logprobs"]

    def start_update(self) -> None:
        self._ask("start_update")

    def update(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        with bucket_file(bucket) as file:
            self._ask("update", file=str(file))

    def finish_update(self, version: int) -> None:
        self._ask("finish_update", version=version)

    def fingerprint(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return self._ask("fingerprint", shapes=shapes)

    def sleep(self) -> None:
        if self._in_place:
            self._ask("sleep")
        else:
            self.close()

    def close(self) -> None:
        """End the process, whatever state it is in."""
        self._child.end()


class RecoveringEngine(PublishedEngine):
    """Replaces a worker that died or hung (or reaches its server again), publishes the last weights anew, and repeats the
    request; not once the run was asked to stop (``Interrupted``).

    It keeps a copy of those weights in main memory for that, in the engine's dtype: the trainer may be a step further by then.
    Without ``retries`` it keeps none. Where ``sleep`` ends the worker, the next ``load_weights`` starts another.
    """

    def __init__(
        self,
        start: Callable[[], LiveEngine],
        policy: Policy,
        tokenizer: Any,
        *,
        max_model_len: int,
        bucket_bytes: int,
        retries: int,
        from_copy: bool = True,
    ) -> None:
        """``from_copy``: weights travel through main memory anyway, and are sent from the copy."""
        super().__init__(start(), policy, tokenizer, max_model_len=max_model_len, bucket_bytes=bucket_bytes)
        self._start = start
        self._retries = retries
        self._from_copy = from_copy
        self._kept: dict[str, Tensor] = {}
        self.restarts = 0
        """How many live engines were replaced so far."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        named = self._policy.checked(weights)
        self._version = None
        if self._retries:
            self._kept = self._copy(named)
        sent = self._kept if self._from_copy else None
        self._persist(lambda: self._publish(named, version, sent), version=None)
        self._version = version

    def _copy(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the engine's dtype, into the memory of the last copy; pinned, where it comes from a GPU."""
        dtype = getattr(torch, self._policy.dtype)
        kept: dict[str, Tensor] = {}
        for name, tensor in self._policy.unique(named):
            cast = tensor.to(dtype)
            old = self._kept.get(name)
            kept[name] = torch.empty_like(cast, device="cpu", pin_memory=cast.is_cuda) if old is None else old
            kept[name].copy_(cast, non_blocking=True)
        if any(tensor.is_cuda for tensor in named.values()):
            torch.cuda.synchronize()
        return self._policy.with_ties(kept)

    def _sample(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[tuple[list[int], list[float]]]:
        return self._persist(lambda: self.live.generate(prompts, sampling, self._stop), version=self._version)

    def sleep(self) -> None:
        try:
            super().sleep()
        except EngineLost:
            self.live.close()  # it is replaced when weights come

    def _restart(self) -> LiveEngine:
        """Another engine like the first one. That one did start, so that what keeps this one from it may pass."""
        try:
            return self._start()
        except UserError as error:
            raise EngineLost(str(error)) from error

    def _persist(self, action: Callable[[], T], *, version: int | None) -> T:
        """``action`` on a live engine, which has the weights of ``version`` unless the action brings them."""
        for attempt in range(self._retries + 1):
            try:
                if not self.live.alive:
                    self.live = self._restart()
                    if version is not None:
                        self._publish(self._kept, version)
                return action()
            except EngineLost as error:
                self.live.close()
                InterruptGuard.check_any()  # who asks a run to stop waits for its checkpoint, not for a new engine
                if attempt == self._retries:
                    if not self._kept:
                        self._version = None
                    raise EngineError(
                        f"{error}; the engine was replaced {attempt} times (vllm.retries = {self._retries}): look at what "
                        "it wrote to stderr, at the free memory, and at vllm.timeout"
                    ) from None
                self.restarts += 1
        raise AssertionError("unreachable")
