"""Fused ops of token-level PPO, reusable without the trainer. Needs torch alone; equations in ``reference``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from tppo_kernels import backend as _backend
from tppo_kernels import reference as _reference

__all__ = ["gae", "linear_logprobs", "logprobs_from_logits", "ppo_loss", "whiten"]

F = TypeVar("F", bound=Callable[..., Any])


def _dispatched(op: F) -> F:
    """The public op: ``backend=`` picks the implementation, else the environment, else the first tensor's device."""

    @functools.wraps(op)
    def call(first: Any, *args: Any, backend: str | None = None, **options: Any) -> Any:
        _backend.choose(backend, first.device.type)
        return op(first, *args, **options)

    return call  # type: ignore[return-value]


logprobs_from_logits = _dispatched(_reference.logprobs_from_logits)
linear_logprobs = _dispatched(_reference.linear_logprobs)
gae = _dispatched(_reference.gae)
whiten = _dispatched(_reference.whiten)
ppo_loss = _dispatched(_reference.ppo_loss)
