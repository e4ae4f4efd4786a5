"""Rollout engines: one protocol, one file each, one shared conformance suite."""

from __future__ import annotations

from typing import Any

import torch

from tppo_fast.config import Config
from tppo_fast.plugins import guarded, load_object
from tppo_fast.rollout.base import RolloutEngine, SamplingParams

__all__ = ["RolloutEngine", "SamplingParams", "build_engine"]


def build_engine(config: Config, tokenizer: Any, device: torch.device) -> RolloutEngine:
    """The configured engine: "hf", or what ``module:function(config, tokenizer, device)`` returns.

    Raises:
        UserError: the engine is unknown or cannot start.
    """
    if config.rollout.engine != "hf":
        spec = config.rollout.engine
        return guarded(load_object(spec, "rollout.engine"), f"rollout.engine = {spec!r}")(config, tokenizer, device)
    from tppo_fast.model import load_causal_lm
    from tppo_fast.rollout.hf_engine import HFEngine

    lm = load_causal_lm(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if config.model.dtype == "bfloat16":
        lm = lm.to(torch.bfloat16)
    return HFEngine(lm.to(device), tokenizer)
