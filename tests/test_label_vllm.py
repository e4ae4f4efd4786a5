"""The LLM judge against a real vLLM server on this machine's CPU: schema-guided answers of a random model fit every time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import no_vllm, tokenizer, wide_llama

from tppo_fast.labelling import read_labels

NO_SPACES = '{"backend": "xgrammar", "disable_any_whitespace": true}'  # a random model writes them for ever
pytestmark = pytest.mark.skipif(bool(no_vllm()), reason=str(no_vllm()))
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a server with a random model that reads up to 4,096 tokens."""
    folder = tmp_path_factory.mktemp("served")
    tok = tokenizer()
    model = wide_llama(len(tok))
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "chat.jinja").write_text(CHAT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096",
        "--chat-template", str(folder / "chat.jinja"),
        "--structured-outputs-config", NO_SPACES,
    ]  # fmt: skip
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **own})
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.parametrize("template", ["token", "sentence"])
def test_answers_of_a_real_server_fit_the_schema(server: str, tmp_path: Path, template: str) -> None:
    sessions, responses, out = (tmp_path / name for name in ("sessions.jsonl", "responses.jsonl", "labels.jsonl"))
    session = {"user_id": "u1", "history": {"search": ["lisbon"]}, "next_queries": ["lisbon tram map"]}
    sessions.write_text(json.dumps(session) + "\n")
    texts = [" lisbon tram, lisbon rome", " one", " a b c d e f g, h i j", ""]
    rows = [json.dumps({"session": 1, "user_id": "u1", "response": text}) for text in texts]
    responses.write_text("\n".join(rows) + "\n")
    done = subprocess.run(
        [
            sys.executable, "-m", "tppo_fast", "label", str(sessions), "--responses", str(responses), "--labeller", "llm",
            "--model", "tiny", "--base-url", server, "--template", template, "--attempts", "1", "--out", str(out),
            "--timeout", "300", "--answer-tokens", "0",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "set aside" not in done.stdout  # not one answer of a model that knows nothing was malformed
    labels = read_labels(out)
    assert [label.response for label in labels] == texts
    assert [len(label.labels.classes) for label in labels] == [5, 1, 11, 0]
