"""The engine's own process: ``python -m tppo_fast.rollout.worker``, started by ``remote.RemoteLive``.

It answers one request after another; weights come as the name of a ``bucket_file``. It ends when the connection does, or when
nobody connects, so that no engine outlives its trainer.
"""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file

from tppo_fast.child import Operations, Parent, done, serve
from tppo_fast.errors import UserError
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.publish import LiveEngine, LiveSettings


def operations(live: LiveEngine) -> Operations:
    """What a request does."""
    return {
        "start_update": lambda _: done(live.start_update()),
        "update": lambda a: done(live.update(list(load_file(a["file"]).items()))),
        "finish_update": lambda a: done(live.finish_update(a["version"])),
        "generate": lambda a: (live.generate(a["prompts"], SamplingParams(**a["sampling"]), a["stop"]), None),
        "probe": lambda a: (None, {"logprobs": live.probe(a["token_ids"])}),
        "sleep": lambda _: done(live.sleep()),
        "fingerprint": lambda a: (None, live.fingerprint({k: tuple(v) for k, v in a["shapes"].items()})),
    }


def main() -> None:
    parent = Parent()
    settings = LiveSettings(**parent.told["settings"])
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        from tppo_fast.rollout.vllm_engine import LiveVLLM

        live = LiveVLLM(settings)
    except UserError as error:
        parent.refuse(error)
        return
    with parent.connected() as (connection,):
        serve(connection, operations(live))
    os._exit(0)  # the interpreter's own end could hang in a library's threads


if __name__ == "__main__":
    main()
