"""What the trainer says to vLLM's server and what it makes of the answers; the server is a stand-in."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import torch
from support import no_vllm

from tppo_fast.errors import EngineLost, UserError
from tppo_fast.rollout import SamplingParams, serve
from tppo_fast.rollout.server import ServerLive, ServerSettings

BUCKET = [("a.weight", torch.ones(3, 2)), ("b.bias", torch.zeros(4, dtype=torch.bfloat16))]
CHOICE = {"index": 0, "finish_reason": "stop", "token_ids": [0], "logprobs": {"token_logprobs": [-1.0]}}


class StandIn:
    """Answers like vLLM's server with ``WorkerExtension``, and keeps what it was asked; ``failing`` routes answer 500."""

    def __init__(self, **settings: Any) -> None:
        self.settings = {
            "dtype": "float32", "logprobs_mode": "processed_logprobs", "transfer": "tppo_local", "max_model_len": 64,
            "workers": 2, "enable_sleep_mode": False, **settings,
        }  # fmt: skip
        self.asked: list[tuple[str, Any]] = []
        self.failing: set[str] = set()
        self.asleep = False
        self._version: str | None = None

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        route, told = request.url.path, json.loads(request.content) if request.content else {}
        self.asked.append((route, told))
        if route in self.failing:
            return httpx2.Response(500, text="out of memory")
        return httpx2.Response(200, json=self._rpc(told) if route == "/collective_rpc" else self._route(route))

    def _route(self, route: str) -> dict[str, Any]:
        known = {
            "/v1/models": {"data": [{"id": "m"}]},
            "/v1/completions": {"choices": [CHOICE]},
            "/is_sleeping": {"is_sleeping": self.asleep},
            "/reset_prefix_cache": {"success": True},
        }
        return known.get(route, {})

    def _rpc(self, told: dict[str, Any]) -> dict[str, Any]:
        self._version = told["kwargs"].get("new", self._version)
        known = {
            "tppo_settings": self.settings,
            "tppo_version": {"version": self._version},
            "tppo_abandon": None,
        }
        return {"results": [known[told["method"]]]}


class Group:
    """An NCCL group of which the other side never takes anything, until it is destroyed."""

    device = torch.device("meta")  # any that is not where the weights are

    def __init__(self) -> None:
        self.destroyed = threading.Event()

    def broadcast(self, *_: Any, **__: Any) -> None:
        self.destroyed.wait()

    def destroy(self) -> None:
        self.destroyed.set()


class Stream(str):
    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("stream"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


def connected(answer: Callable[[httpx2.Request], httpx2.Response], **changes: Any) -> ServerLive:
    values: dict[str, Any] = {
        "url": "http://gpu", "dtype": "float32", "max_model_len": 64, "transfer": "shared_memory",
        "trainer_address": "10.0.0.1", "sleeps": False, "timeout": 5.0, **changes,
    }  # fmt: skip
    return ServerLive(ServerSettings(**values), transport=httpx2.MockTransport(answer))


def test_samples_drawn_while_another_trainer_publishes_are_refused() -> None:
    """Its update has begun and not finished: the weights are half its own."""
    server = StandIn()
    ours, theirs = connected(server), connected(server)
    ours.start_update()
    ours.update(BUCKET)
    ours.finish_update(1)
    sampling = SamplingParams(max_new_tokens=4)
    assert ours.generate([[1, 2]], sampling, [0]) == [([0], [-1.0])]
    theirs.start_update()
    theirs.update(BUCKET)
    with pytest.raises(EngineLost, match="started again or got another trainer's weights"):
        ours.generate([[1, 2]], sampling, [0])


def test_a_connection_that_breaks_while_it_is_made_may_be_tried_again() -> None:
    def broken(request: httpx2.Request) -> httpx2.Response:
        if request.url.path != "/health":
            raise httpx2.ConnectError("connection refused")
        return httpx2.Response(200)

    with pytest.raises(EngineLost, match=r"settings .* did not reach http://gpu \(ConnectError: connection refused\)"):
        connected(broken)


def test_a_server_that_waits_for_a_dead_trainer_is_to_be_restarted() -> None:
    def stuck(request: httpx2.Request) -> httpx2.Response:
        if request.url.path != "/health":
            raise httpx2.ReadTimeout("no answer")
        return httpx2.Response(200)

    with pytest.raises(EngineLost, match=r"settings .* was not answered within 5 s .*: restart the server"):
        connected(stuck)


def test_a_server_that_takes_no_weights_is_refused() -> None:
    server = StandIn()
    server.failing.add("/collective_rpc")
    with pytest.raises(UserError, match=r"takes no weights from a trainer .*; start it by python -m tppo_fast"):
        connected(server)


def test_a_server_that_cannot_sleep_is_refused() -> None:
    with pytest.raises(UserError, match=r"vllm\.url = 'http://gpu': .* start it with --enable-sleep-mode"):
        connected(StandIn(), sleeps=True)
    live = connected(StandIn(enable_sleep_mode=True), sleeps=True)
    live.sleep()
    assert "--enable-sleep-mode" in serve.arguments("m", "shared_memory", ["--enable-sleep-mode"])


# ---------------------------------------------------------------- NCCL


@pytest.mark.skipif(no_vllm() is not None, reason=str(no_vllm()))
@pytest.mark.usefixtures("gpu")
def test_nccl_speaks_vllms_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU run would send, read by vLLM's own types."""
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    from tppo_fast.rollout import vllm_engine

    sent: list[torch.Tensor] = []

    class Taking(Group):
        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
            assert (src, stream, tensor.device) == (0, "stream", self.device)
            sent.append(tensor)

    group, server = Taking(), StandIn(transfer="nccl")
    server.asleep = True
    opened: list[tuple[str, int, int]] = []
    monkeypatch.setattr(vllm_engine, "nccl_group", lambda *a: opened.append(a) or group)
    live = connected(server, transfer="nccl")
    routes = [route for route, _ in server.asked]
    assert routes.index("/shutdown_weight_transfer_engine") < routes.index("/init_weight_transfer_engine")
    told = NCCLWeightTransferInitInfo(**dict(server.asked)["/init_weight_transfer_engine"]["init_info"])
    assert opened == [(told.master_address, told.master_port, told.world_size)]
    assert (told.master_address, told.rank_offset, told.world_size) == ("10.0.0.1", 1, 3)
    live.start_update()
    routes = [route for route, _ in server.asked]
    assert routes.index("/wake_up") < routes.index("/start_weight_update")  # the trainer before left it asleep
    live.update(BUCKET)
    update = NCCLWeightTransferUpdateInfo(**dict(server.asked)["/update_weights"]["update_info"])
    assert (update.names, update.dtype_names) == (["a.weight", "b.bias"], ["float32", "bfloat16"])
    assert update.shapes == [[3, 2], [4]]
    assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for _, t in BUCKET]
    live.close()
    assert server.asked[-1][0] == "/shutdown_weight_transfer_engine"
    assert group.destroyed.is_set()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("failing", [{"/update_weights"}, set()])
def test_a_transfer_that_the_server_does_not_take_ends_in_time(failing: set[str]) -> None:
    """It refuses, or says that it has what it never took; the sender alone would wait for ever."""
    server, group = StandIn(), Group()
    live = connected(server, timeout=0.5)
    live._group, server.failing = group, failing
    reason = r"update .*: the server answered 500 \(out of memory\)" if failing else r"not done within 0\.5 s"
    with pytest.raises(EngineLost, match=rf"transfer by NCCL to http://gpu broke off: {reason}"):
        live.update(BUCKET)
    assert group.destroyed.is_set()
    live.close()
    assert server.asked[-1][0] == "/update_weights"  # the server's side of a broken group could block


@pytest.mark.usefixtures("gpu")
def test_a_sender_that_fails_does_not_wait_for_the_server() -> None:
    stuck = threading.Event()

    class Failing(Group):
        def broadcast(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("NCCL error")

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/update_weights":
            stuck.wait()
        return StandIn()(request)

    live = connected(answer)
    live._group = Failing()
    with pytest.raises(EngineLost, match="broke off: NCCL error"):
        live.update(BUCKET)
    stuck.set()
