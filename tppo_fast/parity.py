"""Does the rollout engine sample from the policy that is trained? Logged on every batch, and a run stops when it does not.

The ratio's denominator can be either side of the comparison (``ppo.old_logprobs``):

- "recompute" (default): the trainer's own log-probabilities before the update. The ratio starts at exactly 1, rounding of
  the engine is no off-policy signal, and clipping measures what the update did. Take it in bfloat16, with an engine of
  other kernels, and whenever ``parity/mean`` is not small against ``ppo.clip_low``.
- "engine": the numbers the engine reported while sampling, those of the distribution that really sampled. Saves nothing
  unless values come from elsewhere, but needs no trust in the recomputation: take it in float32, where both agree to 1e-4,
  or with stale rollouts when the plain ratio to the behaviour policy is wanted instead of truncated importance weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tppo_fast.config import Config
from tppo_fast.errors import EngineError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LIMITS = {"float32": (1e-3, 2e-2), "bfloat16": (1e-1, 5.0)}
"""dtype -> the largest parity/mean and parity/max of an engine that has the trainer's weights, in nats.

SmolLM2-135M in bfloat16 is 0.045 off on average with the very same weights; another policy is off by nats."""


def metrics(engine: Float[Tensor, "A"], trainer: Float[Tensor, "A"]) -> dict[str, Tensor]:
    """How far the log-probabilities of the same A tokens are apart; see the glossary."""
    gap = (trainer - engine).abs()
    ratio = torch.exp(trainer.double() - engine.double())
    ess = ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())
    return {
        "parity/mean": gap.mean(),
        "parity/max": gap.max(),
        "parity/share_above_0.1": (gap > 0.1).float().mean(),
        "parity/ess": ess,
    }


def check(measured: dict[str, float], config: Config) -> None:
    """Stop when an engine that was just given the trainer's weights reports other log-probabilities.

    Rollouts of an older policy differ by right, so with ``rollout.staleness`` the metrics are logged alone (each
    publication is still verified).

    Raises:
        EngineError: naming the metric, its value and its limit.
    """
    rollout = config.rollout
    if rollout.staleness or not rollout.parity_gate:
        return
    own = (rollout.parity_mean_limit, rollout.parity_max_limit)
    for name, given, default in zip(("parity/mean", "parity/max"), own, LIMITS[config.model.dtype], strict=True):
        limit = default if given is None else given
        if not measured[name] <= limit:
            raise EngineError(
                f"{name} = {measured[name]:.3g} nats, at most {limit:g} is allowed in {config.model.dtype}: the rollout "
                f"engine does not sample from the trained policy; look at its weights, or set rollout.{name.replace('/', '_')}"
                "_limit (for logged rollouts, rollout.parity_gate = false)"
            )
