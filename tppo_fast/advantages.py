"""From rewards and values to per-token advantages and returns, all dense vectors over packed actions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import tppo_kernels as tk
from torch import Tensor

from tppo_fast.config import PPOConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def penalised_rewards(
    rewards: Float[Tensor, "A"], logprobs: Float[Tensor, "A"], ref_logprobs: Float[Tensor, "A"], kl_coef: float
) -> Float[Tensor, "A"]:
    """r_t - kl_coef (log pi_old(a_t) - log pi_ref(a_t)): KL as a per-token penalty, k1 (arXiv 1909.08593, eq. 2)."""
    return rewards - kl_coef * (logprobs - ref_logprobs)


def estimate(
    rewards: Float[Tensor, "A"],
    values: Float[Tensor, "A"],
    final_values: Float[Tensor, "B"],
    truncated: Bool[Tensor, "B"],
    cu_actions: Int[Tensor, "B+1"],
    config: PPOConfig,
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """(advantages before whitening, returns).

    The policy's lambda is ``config.lam``, or 1 - 1 / (a length) per response when ``lam_adaptive`` is set (VAPO,
    arXiv 2504.05118); the critic's targets use ``config.lam_critic`` when it differs (VC-PPO, arXiv 2503.01491).
    """
    bootstrap = final_values * truncated if config.bootstrap_truncated else torch.zeros_like(final_values)
    lam: float | Tensor = config.lam
    if config.lam_adaptive is not None:
        lam = (1.0 - 1.0 / (config.lam_adaptive * cu_actions.diff().clamp_min(1))).clamp_min(0.0).to(values.dtype)
    advantages, returns = tk.gae(rewards, values, cu_actions, gamma=config.gamma, lam=lam, bootstrap=bootstrap)
    if config.lam_critic is not None:
        _, returns = tk.gae(rewards, values, cu_actions, gamma=config.gamma, lam=config.lam_critic, bootstrap=bootstrap)
    return advantages, returns
