"""vLLM's own server, really started and reached over HTTP: the suite of every engine, and what can go wrong between the two."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import test_rollout
import torch
from support import no_vllm, tokenizer
from test_rollout import params
from test_vllm import config, disturb, gap, load_actor
from test_vllm_worker import run

from tppo_fast import config as settings
from tppo_fast.data_types import Prompt
from tppo_fast.errors import EngineError, UserError
from tppo_fast.rollout import RolloutEngine, build_engine
from tppo_fast.rollout.server import ServerLive, ServerSettings

needs_vllm = pytest.mark.skipif(no_vllm() is not None, reason=str(no_vllm()))
KEY = "secret-key-of-this-test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server of its own process group, that can be killed and started again at the same URL."""

    def __init__(self, folder: Path, log: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.command = [
            sys.executable, "-P", "-m", "tppo_fast.rollout.serve", str(folder), "--port", str(port),
            "--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(50 << 20),
        ]  # fmt: skip

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.running = subprocess.Popen(
                self.command, stdout=output, stderr=output, env={**os.environ, "VLLM_API_KEY": KEY},
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        os.killpg(self.running.pid, signal.SIGKILL)  # vLLM's engine is a child of its server
        self.running.wait()


@pytest.fixture(scope="module")
def server(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(wide_model, tmp_path_factory.mktemp("server") / "log")
    made.start()
    try:
        yield made
    finally:
        made.kill()


def build(folder: Path, url: str, **vllm: Any) -> Any:
    made = config(folder, process="server", url=url, kv_cache_gib=None, timeout=400.0, **vllm)
    return build_engine(made, tokenizer(), torch.device("cpu"))


@pytest.fixture(scope="module")
def engine(server: Server, wide_model: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        with contextlib.closing(build(wide_model, server.url, bucket_mib=1)) as made:
            yield made


@pytest.fixture
def actor(wide_model: Path) -> Any:
    return load_actor(wide_model)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    tok = tokenizer()
    texts = ["pasta", "lisbon hotels", 3 * "cheap flights to lisbon, " + "tram map"]
    return [
        Prompt(token_ids=tok.encode(t), user_id=t, history=(t,), next_queries=("x",), relevant_queries=("x",))
        for t in texts
    ]


def disturb_at(monkeypatch: pytest.MonkeyPatch, moment: str, action: Any) -> list[str]:
    """Run an action once, right before the first request whose description starts with ``moment``; returns the log."""
    done: list[str] = []

    def sent(self: ServerLive, what: str) -> None:
        if what.startswith(moment) and not done:
            done.append(what)
            action(self)

    monkeypatch.setattr(ServerLive, "_sent", sent)
    return done


@needs_vllm
class TestServerConformance(test_rollout.TestConformance):
    """The suite of every engine; the server outlives the connection that the last test closes."""

    @pytest.fixture
    def engine(self, engine: Any) -> Any:
        engine._version = None
        return engine

    def test_same_seed_same_rollouts(self, engine: RolloutEngine, actor: Any, prompts: list[Prompt]) -> None:
        """To rounding: the server's batches depend on when requests arrive."""
        engine.load_weights(actor.named_weights(), version=0)
        first, second = engine.generate(prompts, params()), engine.generate(prompts, params())
        assert [r.token_ids for r in first] == [r.token_ids for r in second]
        for one, other in zip(first, second, strict=True):
            assert list(one.logprobs) == pytest.approx(list(other.logprobs), abs=1e-5)


@needs_vllm
class TestServer:
    def test_rounds_of_change_publish_generate(self, engine: Any, actor: Any, prompts: list[Prompt]) -> None:
        for version in range(8):
            disturb(actor, version)
            engine.load_weights(actor.named_weights(), version)
            assert gap(actor, engine, prompts, params(seed=version)) < 1e-3
        assert gap(actor, engine, prompts, params(temperature=0.5)) < 1e-4
        assert gap(actor, engine, prompts, params(greedy=True)) < 1e-4

    def test_a_skipped_publish_is_caught(
        self, engine: Any, actor: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[Prompt]
    ) -> None:
        engine.load_weights(actor.named_weights(), 0)
        disturb(actor, 1, size=1e-5)
        monkeypatch.setattr(ServerLive, "update", lambda *_: None)
        with pytest.raises(EngineError, match=r"weight '.*' of the rollout engine is not the published one"):
            engine.load_weights(actor.named_weights(), 1)
        with pytest.raises(UserError, match="before load_weights"):
            engine.generate(prompts, params())

    @pytest.mark.parametrize("moment", ["generate", "update"])
    def test_a_server_that_lost_the_weights_gets_them_again(
        self, engine: Any, actor: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        """As after a restart: other weights, and no version that this trainer gave."""
        engine.load_weights(actor.named_weights(), 1)
        expected = [r.token_ids for r in engine.generate(prompts, params())]
        other = load_actor(Path(actor.lm.config._name_or_path))
        disturb(other, 17, size=0.1)

        def forget(live: ServerLive) -> None:
            monkeypatch.undo()
            intruder = ServerLive(live._settings)
            intruder.start_update()
            intruder.update([(n, t) for n, t in other.named_weights() if n != "lm_head.weight"])
            intruder.finish_update(99)
            intruder.close()
            monkeypatch.setenv("VLLM_API_KEY", KEY)

        before = engine.restarts
        disturbed = disturb_at(monkeypatch, moment, forget)
        if moment == "update":
            engine.load_weights(actor.named_weights(), 1)
        assert [r.token_ids for r in engine.generate(prompts, params())] == expected
        assert disturbed
        assert engine.restarts > before

    def test_a_request_that_hangs_is_named_and_repeated(
        self, server: Server, engine: Any, actor: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine.load_weights(actor.named_weights(), 1)
        expected = [r.token_ids for r in engine.generate(prompts, params())]
        group = server.running.pid
        disturb_at(monkeypatch, "generate", lambda _: os.killpg(group, signal.SIGSTOP))
        monkeypatch.setattr(engine.live._client, "timeout", httpx2.Timeout(1.0))
        monkeypatch.setattr(engine, "_retries", 0)
        try:
            with pytest.raises(EngineError, match=r"generate prompt \d of 3 \(request tppo-\w+-\d+\) was not answered"):
                engine.generate(prompts, params())
        finally:
            os.killpg(group, signal.SIGCONT)
        monkeypatch.undo()
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        assert [r.token_ids for r in engine.generate(prompts, params())] == expected

    def test_another_dtype_is_refused(self, server: Server, engine: Any) -> None:
        del engine
        live = {"url": server.url, "transfer": "shared_memory", "trainer_address": "", "sleeps": False, "timeout": 9.0}
        with pytest.raises(UserError, match=r"its dtype is 'float32', this run needs 'bfloat16'"):
            ServerLive(ServerSettings(dtype="bfloat16", max_model_len=64, **live))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"start it with --max-model-len 999"):
            ServerLive(ServerSettings(dtype="float32", max_model_len=999, **live))  # type: ignore[arg-type]

    def test_a_wrong_key_is_one_sentence(
        self, server: Server, engine: Any, wide_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        del engine
        monkeypatch.setenv("VLLM_API_KEY", "wrong")
        with pytest.raises(EngineError, match="set the environment variable VLLM_API_KEY") as caught:
            build(wide_model, server.url)
        assert "wrong" not in str(caught.value)

    def test_a_run_with_a_killed_server_is_the_same_run(
        self, server: Server, wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SIGKILL in mid-rollout of the second step; whoever looks after the server starts it again."""
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        options = {"steps": 3, "process": "server", "url": server.url, "kv_cache_gib": None, "timeout": 400.0}
        undisturbed = run(wide_model, tmp_path / "undisturbed", **options)
        requests, counting = itertools.count(1), threading.Lock()
        killed: list[str] = []

        def sent(_: ServerLive, what: str) -> None:
            if not what.startswith("generate"):
                return
            with counting:  # requests are sent by many threads at once
                number = next(requests)
            if number == 10:  # 4 of the first evaluation, 4 of the first step
                killed.append(what)
                server.kill()
                server.start()

        monkeypatch.setattr(ServerLive, "_sent", sent)
        disturbed = run(wide_model, tmp_path / "disturbed", **options)
        assert len(killed) == 1
        assert next(requests) > 16 + 4  # what the undisturbed run sends, and the second step again
        for one, other in zip(undisturbed, disturbed, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)  # batches form as requests arrive


# ---------------------------------------------------------------- without a server


def test_nobody_there_is_one_sentence(wide_model: Path) -> None:
    made = config(wide_model, process="server", url=f"http://127.0.0.1:{free_port()}", timeout=0.5, retries=0)
    with pytest.raises(
        EngineError, match=r"did not reach http.*; start it by python -m tppo_fast\.rollout\.serve MODEL"
    ):
        build_engine(made, tokenizer(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("vllm", "message"),
    [
        ({"process": "server"}, "a server needs one"),
        ({"process": "worker", "url": "http://a"}, "a URL goes with"),
        ({"process": "server", "url": "a:80"}, "write http://host:port"),
        ({"process": "server", "url": "http://a", "sleep": "stop"}, "ends a process"),
    ],
)
def test_settings_that_do_not_go_together(vllm: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        settings.build({"vllm": vllm})
    assert "\n" not in str(caught.value)
