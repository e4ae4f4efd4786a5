"""Rollout engines: one protocol, one file each, one shared conformance suite."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tppo_fast.config import RunConfig
from tppo_fast.errors import UserError
from tppo_fast.plugins import guarded, load_object
from tppo_fast.rollout.base import RolloutEngine, SamplingParams, max_positions
from tppo_fast.rollout.plug_in import PlugIn

if TYPE_CHECKING:
    from tppo_fast.rollout.publish import LiveEngine, LiveSettings

__all__ = ["RolloutEngine", "SamplingParams", "build_engine"]


def build_engine(config: RunConfig, tokenizer: Any, device: torch.device) -> RolloutEngine:
    """The configured engine: "hf", "vllm", or what ``module:function(config, tokenizer, device)`` returns.

    Raises:
        UserError: the engine is unknown or cannot start.
    """
    if config.rollout.engine == "vllm":
        return _vllm(config, tokenizer, device)
    if config.rollout.engine != "hf":
        from tppo_fast.loading import load_settings

        field = f"rollout.engine = {config.rollout.engine!r}"
        made = guarded(load_object(config.rollout.engine, "rollout.engine"), field)(config, tokenizer, device)
        settings = load_settings(config.model.path, trust_remote_code=config.model.trust_remote_code)
        return PlugIn(made, field, settings.get_text_config().vocab_size)
    from tppo_fast.loading import load_causal_lm
    from tppo_fast.rollout.hf_engine import HFEngine

    lm = load_causal_lm(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if config.model.dtype == "bfloat16":
        for parameter in lm.parameters():  # and no buffer: rotary frequencies stay as the trainer has them
            parameter.data = parameter.data.bfloat16()
    return HFEngine(lm.to(device), tokenizer)


def _vllm(config: RunConfig, tokenizer: Any, device: torch.device) -> RolloutEngine:
    from tppo_fast.rollout.publish import LiveSettings, Policy, PublishedEngine

    own, path, dtype = config.vllm, config.model.path, config.model.dtype
    cpu = device.type == "cpu"
    if cpu and own.sleep == "discard":
        raise UserError(
            'vllm.sleep = "discard": vLLM frees memory in place on a GPU only; use "off", or "stop" with '
            'vllm.process = "worker"'
        )
    if cpu and own.transfer == "nccl":
        raise UserError('vllm.transfer = "nccl": weights travel so between GPUs, and this run is on a CPU')
    if not cpu and own.process == "colocated" and config.rollout.staleness:
        raise UserError(
            f'rollout.staleness = {config.rollout.staleness} with vllm.process = "colocated": on a GPU, sampling and the update '
            'in one process wait for each other; set process = "worker"'
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if (
            own.sleep == "discard"
            and own.process != "server"
            and "expandable_segments:True" in os.environ.get(name, "")
        ):
            raise UserError(
                f'{name} = {os.environ[name]!r}: vLLM cannot free memory in place (vllm.sleep = "discard") where segments '
                "expand; unset it"
            )
    policy = Policy(path, dtype, trust_remote_code=config.model.trust_remote_code)
    wanted = max(config.data.max_prompt_tokens + config.rollout.max_new_tokens, len(policy.probe_ids) + 1)
    settings = LiveSettings(
        path=path,
        dtype=dtype,
        device="cpu" if cpu else "cuda",
        max_model_len=min(wanted, max_positions(policy.config) or wanted),
        kv_cache_gib=own.kv_cache_gib,
        gpu_memory_share=own.gpu_memory_share,
        sleeps=own.sleep == "discard",
        eager=own.eager or cpu,
        trust_remote_code=config.model.trust_remote_code,
        threads=config.threads,
    )
    shared: dict[str, Any] = {"max_model_len": settings.max_model_len, "bucket_bytes": own.bucket_mib << 20}
    if own.process == "colocated":
        from tppo_fast.rollout.vllm_engine import LiveVLLM

        return PublishedEngine(LiveVLLM(settings), policy, tokenizer, **shared)
    from tppo_fast.rollout.remote import RecoveringEngine

    start = _server(config, settings) if own.process == "server" else _worker(config, settings)
    over_nccl = own.process == "server" and own.transfer == "nccl"
    return RecoveringEngine(start, policy, tokenizer, retries=own.retries, from_copy=not over_nccl, **shared)


def _worker(config: RunConfig, settings: LiveSettings) -> Callable[[], LiveEngine]:
    from tppo_fast.rollout.remote import RemoteLive

    return partial(RemoteLive, settings, timeout=config.vllm.timeout)


def _server(config: RunConfig, settings: LiveSettings) -> Callable[[], LiveEngine]:
    from tppo_fast.rollout.server import ServerLive, ServerSettings

    own = config.vllm
    return partial(
        ServerLive,
        ServerSettings(
            url=str(own.url),
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            transfer=own.transfer,
            trainer_address=own.trainer_address,
            sleeps=settings.sleeps,
            timeout=own.timeout,
        ),
    )
