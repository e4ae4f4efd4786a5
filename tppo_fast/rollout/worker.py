"""The engine's own process: ``python -m tppo_fast.rollout.worker``, started by ``remote.RemoteLive``.

It reads one JSON line from stdin (key, engine settings), prints the port it listens on, and then answers one request after
another on an authenticated TCP connection: JSON and, where an answer has tensors, their safetensors bytes. Weights come as the
name of a ``bucket_file``. No pickle. It ends when the connection does, or when nobody connects, so that no engine outlives its
trainer; and neither by Ctrl-C nor by SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from typing import Any

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from tppo_fast.errors import UserError
from tppo_fast.interrupt import FROM_OUTSIDE
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.publish import LiveEngine, LiveSettings

Answer = tuple[Any, dict[str, Tensor] | None]


def operations(live: LiveEngine) -> dict[str, Callable[[dict[str, Any]], Answer]]:
    """name -> what a request does with its arguments."""

    def done(_: None) -> Answer:
        return None, None

    return {
        "start_update": lambda _: done(live.start_update()),
        "update": lambda a: done(live.update(list(load_file(a["file"]).items()))),
        "finish_update": lambda a: done(live.finish_update(a["version"])),
        "generate": lambda a: (live.generate(a["prompts"], SamplingParams(**a["sampling"]), a["stop"]), None),
        "probe": lambda a: (None, {"logprobs": live.probe(a["token_ids"])}),
        "sleep": lambda _: done(live.sleep()),
        "fingerprint": lambda a: (None, live.fingerprint({k: tuple(v) for k, v in a["shapes"].items()})),
    }


def send(connection: Connection, header: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    """One message: a header that says whether tensors follow, and the tensors."""
    connection.send_bytes(json.dumps({**header, "tensors": tensors is not None}).encode())
    if tensors is not None:
        connection.send_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def receive(connection: Connection) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(connection.recv_bytes())
    return header, load(connection.recv_bytes()) if header["tensors"] else {}


def serve(connection: Connection, live: LiveEngine) -> None:
    """Answer until the other side is gone."""
    known = operations(live)
    while True:
        try:
            header, _ = receive(connection)
        except (EOFError, OSError):
            return
        reply: dict[str, Any] = {"id": header["id"]}
        sent: dict[str, Tensor] | None = None
        try:
            reply["result"], sent = known[header["operation"]](header["arguments"])
        except UserError as error:
            reply["user_error"] = str(error)
        except Exception as error:  # the trainer's side says it, with the request's name
            reply["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        send(connection, reply, sent)


def main() -> None:
    for number in (signal.SIGINT, *FROM_OUTSIDE):  # the trainer's to handle, though all its processes are told
        signal.signal(number, signal.SIG_IGN)
    told = json.loads(sys.stdin.readline())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for the answer
    settings = LiveSettings(**told["settings"])
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        from tppo_fast.rollout.vllm_engine import LiveVLLM

        live = LiveVLLM(settings)
    except UserError as error:
        print(json.dumps({"user_error": str(error)}), file=answer, flush=True)
        return
    with Listener(("127.0.0.1", 0), authkey=bytes.fromhex(told["key"])) as listener:
        print(json.dumps({"port": listener.address[1]}), file=answer, flush=True)
        answer.close()
        signal.alarm(60)  # seconds: a trainer that died meanwhile never connects
        with listener.accept() as connection:
            signal.alarm(0)
            serve(connection, live)
    os._exit(0)  # the interpreter's own end could hang in a library's threads


if __name__ == "__main__":
    main()
