"""A live engine behind a URL: vLLM's own server, started by ``python -m tppo_fast.rollout.serve``.

Sampling goes through ``/v1/completions`` with token ids, one request per prompt, all at once: vLLM batches them. Weights go
through vLLM's weight-transfer routes: as safetensors files in shared memory (server and trainer on one machine), or by NCCL
between GPUs (any machines). The server remembers which weights it was given under a name of this trainer's, which dies with
its process: after each request, an answer of a server that started again or got other weights is not used.

Sampling repeats from its seeds, but the server forms batches as requests arrive, so that log-probabilities repeat to rounding
only, where ``vllm.process`` "colocated" and "worker" repeat them bit for bit.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import httpx2
import torch
from torch import Tensor

from tppo_fast.background import started
from tppo_fast.errors import EngineError, EngineLost, UserError
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.bucket_file import bucket_file
from tppo_fast.rollout.publish import sampling_arguments

T = TypeVar("T")

API_KEY = "VLLM_API_KEY"
"""Environment variable with the server's key, if it wants one: the name that vLLM's server reads, too."""
CONCURRENT = 256
"""Requests under way at once."""
START = "python -m tppo_fast.rollout.serve"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the server is, and what it must be."""

    url: str
    """http(s)://host:port."""
    dtype: Literal["float32", "bfloat16"]
    """Arithmetic of the engine."""
    max_model_len: int
    """Longest prompt plus response that will be asked for, in tokens, the probe's included."""
    transfer: Literal["shared_memory", "nccl"]
    """How weights travel."""
    trainer_address: str
    """This machine as the server's sees it, for NCCL's rendezvous."""
    sleeps: bool
    """Whether ``sleep`` frees its memory."""
    timeout: float
    """Seconds that one request may take, and that the server may take to be there."""


class ServerLive:
    """``LiveEngine`` over HTTP. Every request is a function of the weights and its arguments: repeating one changes nothing."""

    def __init__(self, settings: ServerSettings, *, transport: httpx2.BaseTransport | None = None) -> None:
        """Wait for the server and check that it can serve this run.

        Raises:
            EngineLost: nothing answers at the URL.
            UserError: the server is none of ``tppo_fast.rollout.serve``, or was started for another model or dtype.
        """
        self._settings = settings
        self._name = secrets.token_hex(8)  # of the weights this connection brings
        self._expected: str | None = None
        self._count = 0
        self._asleep = False
        self._group: Any = None
        key = os.environ.get(API_KEY)
        self._client = httpx2.Client(
            base_url=settings.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(settings.timeout, connect=min(settings.timeout, 10.0)),
            # vLLM's server ends a connection that was idle for 5 s: let go of it before that.
            limits=httpx2.Limits(max_connections=CONCURRENT + 8, keepalive_expiry=2.0),
            transport=transport,
        )
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------------- requests

    def _ask(self, method: str, path: str, what: str, **arguments: Any) -> Any:
        """The JSON of an answer. Raises EngineLost where a repeated request may be answered, EngineError where not."""
        self._count += 1
        request = f"{what} (request tppo-{self._name}-{self._count})"
        headers = {"X-Request-Id": f"tppo-{self._name}-{self._count}"}
        try:
            self._sent(what)
            answer = self._client.request(method, path, headers=headers, **arguments)
        except httpx2.TimeoutException as error:
            raise EngineLost(
                f"{request} was not answered within {self._settings.timeout:g} s by {self._settings.url}"
            ) from error
        except (httpx2.TransportError, RuntimeError) as error:  # RuntimeError: the client was closed
            raise EngineLost(
                f"{request} did not reach {self._settings.url} ({type(error).__name__}: {error})"
            ) from error
        if answer.status_code == 401:
            raise EngineError(f"{self._settings.url} wants an API key: set the environment variable {API_KEY} to it")
        if answer.is_error:
            kind = EngineLost if answer.status_code >= 500 else EngineError
            raise kind(f"{request}: the server answered {answer.status_code} ({' '.join(answer.text.split())[:300]})")
        return answer.json() if answer.content else None

    def _sent(self, what: str) -> None:
        """A request is about to go: a place for tests to disturb the server."""

    def _rpc(self, method: str, what: str, **kwargs: Any) -> Any:
        """A method of ``WorkerExtension`` on the first worker."""
        return self._ask("POST", "/collective_rpc", what, json={"method": method, "kwargs": kwargs})["results"][0]

    def _connect(self) -> None:
        self._wait()
        own = self._settings
        try:
            served = self._rpc("tppo_settings", "settings")
        except EngineError as error:
            if isinstance(error.__cause__, httpx2.TimeoutException):
                raise EngineLost(
                    f"{error}; it may wait for a trainer that died while it sent weights: restart the server"
                ) from error
            if error.__cause__ is not None:  # no answer at all says nothing of the server
                raise
            raise UserError(
                f"vllm.url = {own.url!r}: the server there takes no weights from a trainer ({error}); start it by {START} MODEL"
            ) from None
        backend = {"shared_memory": "tppo_local", "nccl": "nccl"}[own.transfer]
        wanted = {"dtype": own.dtype, "logprobs_mode": "processed_logprobs", "transfer": backend}
        for name, value in wanted.items():
            if served[name] != value:
                raise UserError(
                    f"vllm.url = {own.url!r}: its {name} is {served[name]!r}, this run needs {value!r}; see {START} --help"
                )
        if own.sleeps and not served["enable_sleep_mode"]:
            raise UserError(
                f"vllm.url = {own.url!r}: it cannot free memory, as vllm.sleep wants: start it with --enable-sleep-mode"
            )
        if served["max_model_len"] < own.max_model_len:
            raise UserError(
                f"vllm.url = {own.url!r}: it takes {served['max_model_len']} tokens, this run needs {own.max_model_len} "
                "(data.max_prompt_tokens + rollout.max_new_tokens, or the prompt that checks a publication): start it with "
                f"--max-model-len {own.max_model_len}"
            )
        self._model = self._ask("GET", "/v1/models", "model name")["data"][0]["id"]
        self._ask("POST", "/abort_requests", "abort", json={})  # what a lost connection left under way
        self._asleep = self._ask("GET", "/is_sleeping", "sleep check")["is_sleeping"]  # or left asleep
        if own.transfer == "nccl":
            self._open_group(served["workers"])
        else:
            self._ask("POST", "/init_weight_transfer_engine", "transfer", json={"init_info": {}})

    def _wait(self) -> None:
        """Until the server says that it is well, for as long as one request may take."""
        began = time.monotonic()
        while True:
            try:
                self._ask("GET", "/health", "health check")
                return
            except EngineLost as error:
                if time.monotonic() - began > self._settings.timeout:
                    raise EngineLost(f"vllm.url = {self._settings.url!r}: {error}; start it by {START} MODEL") from None
            time.sleep(0.5)

    # ---------------------------------------------------------------- sampling

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, stop: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        self._reset_cache()

        def sample(index: int) -> list[tuple[list[int], list[float]]]:
            body = sampling_arguments(index, sampling, stop)
            choices = self._complete(prompts[index], f"generate prompt {index} of {len(prompts)}", body)
            return [(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in choices]

        with ThreadPoolExecutor(min(CONCURRENT, max(len(prompts), 1)), thread_name_prefix="request") as pool:
            tasks = [pool.submit(sample, index) for index in range(len(prompts))]
            try:
                answers = [answer for task in tasks for answer in task.result()]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those under way end within the timeout, too
                raise
        self._check_version("generate")
        return answers

    def _complete(self, token_ids: Sequence[int], what: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        fixed = {"model": self._model, "prompt": list(token_ids), "return_token_ids": True}
        choices = self._ask("POST", "/v1/completions", what, json=fixed | body)["choices"]
        if cut := {c["finish_reason"] for c in choices} - {"stop", "length"}:
            raise EngineLost(f"{what}: the server ended it early ({', '.join(map(str, cut))})")
        return sorted(choices, key=lambda choice: choice["index"])

    def probe(self, token_ids: Sequence[int]) -> Tensor:
        self._reset_cache()
        body = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        steps = self._complete(token_ids, "probe", body)[0]["prompt_logprobs"][1:]
        self._check_version("probe")
        return torch.tensor([step[str(t)]["logprob"] for step, t in zip(steps, token_ids[1:], strict=True)])

    def _reset_cache(self) -> None:
        if not self._ask("POST", "/reset_prefix_cache", "cache reset")["success"]:
            raise EngineLost(
                f"{self._settings.url} did not reset its prefix cache, so that old weights could live on in it"
            )

    def _check_version(self, what: str) -> None:
        found = self._rpc("tppo_version", "version check")["version"]
        if found is None or found != self._expected:
            raise EngineLost(f"during {what}, {self._settings.url} started again or got another trainer's weights")

    # ---------------------------------------------------------------- weights

    def start_update(self) -> None:
        self.wake()
        self._expected = None
        self._rpc("tppo_version", "version", new="")  # whoever sampled with the weights so far must notice
        self._rpc("tppo_abandon", "end of a broken-off update")
        self._ask("POST", "/start_weight_update", "start_update")

    def update(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        if self._group is not None:
            self._broadcast(bucket)
            return
        with bucket_file(bucket) as file:
            self._ask("POST", "/update_weights", "update", json={"update_info": {"file": str(file)}})

    def finish_update(self, version: int) -> None:
        self._ask("POST", "/finish_weight_update", "finish_update", json={})
        self._reset_cache()
        self._expected = f"{self._name}/{version}"
        self._rpc("tppo_version", "version", new=self._expected)

    def _open_group(self, workers: int) -> None:
        """Rendezvous with every worker of the server; both sides block until all are there.

        What a connection before this one left there is given back first, or would never be.
        """
        from tppo_fast.rollout.vllm_engine import nccl_group

        self._rpc("tppo_abandon", "end of a broken-off update")
        with contextlib.suppress(EngineError):  # vLLM 0.26 has no such route
            self._ask("POST", "/shutdown_weight_transfer_engine", "transfer")
        address, port = self._settings.trainer_address, _free_port()
        told = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": workers + 1}
        self._group = self._together(
            lambda: self._ask("POST", "/init_weight_transfer_engine", "transfer", json={"init_info": told}),
            lambda: nccl_group(address, port, workers + 1),
        )

    def _broadcast(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """The server receives (it is told what) while this GPU sends, tensor by tensor."""
        told = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
            "shapes": [list(t.shape) for _, t in bucket],
        }

        def send() -> None:
            stream = torch.cuda.current_stream()
            kept = [t.detach().to(self._group.device).contiguous() for _, t in bucket]  # alive until all is sent
            for tensor in kept:
                self._group.broadcast(tensor, src=0, stream=stream)
            stream.synchronize()

        self._together(lambda: self._ask("POST", "/update_weights", "update", json={"update_info": told}), send)

    def _together(self, request: Callable[[], Any], action: Callable[[], T]) -> T:
        """What ``action`` returns, done while ``request`` is under way.

        Raises:
            EngineLost: either failed, or both took too long. The group is gone then: the other side may never answer.
        """
        stream = torch.cuda.current_stream()

        def on_stream() -> T:
            with torch.cuda.stream(stream):  # a thread starts on the first GPU
                return action()

        both = started(request), started(on_stream)  # NCCL may block for ever
        late = wait(both, self._settings.timeout, FIRST_EXCEPTION).not_done
        error = next((e for future in both if future not in late and (e := future.exception())), None)
        if error is None and not late:
            return both[1].result()
        self._destroy_group()
        if isinstance(error, (UserError, EngineError)) and not isinstance(error, EngineLost):
            raise error  # trying again would not help
        reason = error or f"not done within {self._settings.timeout:g} s"
        raise EngineLost(f"the transfer by NCCL to {self._settings.url} broke off: {reason}") from None

    def _destroy_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.destroy()

    def fingerprint(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        found = self._rpc("tppo_fingerprint", "fingerprint", shapes=json.dumps(shapes))
        return {
            name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
            for name, text in found.items()
        }

    # ---------------------------------------------------------------- memory

    def sleep(self) -> None:
        if self._settings.sleeps and not self._asleep:
            self._ask("POST", "/sleep", "sleep", params={"level": 2})
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._ask("POST", "/wake_up", "wake")
            self._asleep = False

    @property
    def alive(self) -> bool:
        return not self._client.is_closed

    def close(self) -> None:
        """Leave the server running, with the weights it has."""
        if self._group is not None:
            with contextlib.suppress(EngineError):
                self._ask("POST", "/shutdown_weight_transfer_engine", "transfer")
            self._destroy_group()
        self._client.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
