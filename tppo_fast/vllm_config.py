"""The ``vllm`` section of a config: how the vLLM engine runs. Torch-free, like ``config``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tppo_fast.sections import Count, Positive, Section


class VLLMConfig(Section):
    """Only read with ``rollout.engine = "vllm"``."""

    process: Literal["colocated", "worker", "server"] = "colocated"
    """"colocated": vLLM lives in the trainer's process. "worker": in a process of its own, restarted if it dies. "server": a
    vLLM server at ``url``, started by ``python -m tppo_fast.rollout.serve``, on this machine or another; for one trainer, which
    ends whatever is sampled there when it connects."""
    url: str | None = None
    """http://host:port of the server; its API key, if it wants one, comes from the environment variable VLLM_API_KEY."""
    transfer: Literal["shared_memory", "nccl"] = "shared_memory"
    """How weights reach the server. "shared_memory": on the same machine; "nccl": from GPU to GPU, also between machines, where
    trainer and server have GPUs of their own."""
    trainer_address: str = "127.0.0.1"
    """This machine's address as the server sees it, with ``transfer`` "nccl"."""
    kv_cache_gib: Positive | None = None
    """Memory for the key-value cache. None: 1 GiB on a CPU, what ``gpu_memory_share`` leaves on a GPU."""
    gpu_memory_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Share of the GPU's memory that vLLM may take, and must find free when it starts; the trainer needs the rest. Not read with
    ``kv_cache_gib``."""
    eager: bool = False
    """Start faster on a GPU, without CUDA graphs and compilation; a CPU always runs so."""
    bucket_mib: Count = 256
    """Weights travel to the engine in groups of at most this size."""
    sleep: Literal["off", "discard", "stop"] = "off"
    """What is freed during the update. "discard": weights, which are published anew anyway, and KV cache (GPU only). "stop": the
    worker process ends and a new one starts for the next rollouts: frees everything, anywhere, for one engine start a step."""
    timeout: Positive = 600.0
    """Seconds that a worker or server may take to answer one request before it counts as lost."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often in a row a worker that died or hung is replaced (a server reached again), the weights published anew and the
    request repeated."""

    @model_validator(mode="after")
    def _stoppable(self) -> VLLMConfig:
        if self.sleep == "stop" and self.process != "worker":
            raise ValueError(
                f'vllm.sleep = "stop" ends a process, and vllm.process = "{self.process}" has none of its own: '
                'set process = "worker"'
            )
        return self

    @model_validator(mode="after")
    def _reachable(self) -> VLLMConfig:
        if (self.process == "server") != (self.url is not None):
            raise ValueError(
                f'vllm.url = {self.url!r} with vllm.process = "{self.process}": a URL goes with process = "server", and '
                "a server needs one"
            )
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"vllm.url = {self.url!r}: write http://host:port or https://host:port")
        return self
