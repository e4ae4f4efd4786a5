"""The public ops: argument checks, then the chosen backend. The equations stand in ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .backend import implementation
from .reference import KLEstimator, TokenLoss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def _check_logits(name: str, logits: Tensor, targets: Tensor, temperature: float, softcap: float | None) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)} and targets {tuple(targets.shape)}: give one row per target"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets are {targets.dtype}: give token ids, as integers")
    if temperature <= 0.0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap {softcap}: must be above 0 (or None)")


def _check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    _check_logits("hidden", hidden, targets, temperature, softcap)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (vocabulary, {hidden.shape[1]}), as hidden")
    _check_rows(len(weight), bias=bias)


def _check_rows(count: int, **rows: Tensor | None) -> None:
    for name, row in rows.items():
        if row is not None and row.shape != (count,):
            raise ValueError(f"{name} has shape {tuple(row.shape)}: expected ({count},)")
        if name == "mask" and row is not None and row.dtype != torch.bool:
            raise ValueError(f"mask is {row.dtype}: pass mask.bool(), True where an action counts")


def logprobs_from_logits(
    logits: Float[Tensor, "A V"],
    targets: Int[Tensor, "A"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """(log-probability of each target, entropy of each row): see ``reference.logprobs_from_logits``.

    Raises:
        ValueError: shapes disagree, or temperature or softcap is not above 0.
    """
    _check_logits("logits", logits, targets, temperature, softcap)
    return implementation(backend, logits.device.type).logprobs_from_logits(
        logits, targets, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        inplace_backward=inplace_backward,
    )  # fmt: skip


def linear_logprobs(
    hidden: Float[Tensor, "A D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "A"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    compact_rows: bool | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """Log-probabilities and entropies of a language-model head, chunk by chunk: see ``reference.linear_logprobs``.

    Raises:
        ValueError: shapes disagree, or temperature, softcap or chunk_size is out of range.
    """
    _check_head(hidden, weight, targets, bias, temperature, softcap)
    return implementation(backend, hidden.device.type).linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        chunk_size=chunk_size, logits_dtype=logits_dtype, compact_rows=compact_rows,
    )  # fmt: skip


def linear_token_loss(
    hidden: Float[Tensor, "A D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "A"],
    loss_fn: TokenLoss,
    rows: Sequence[Tensor | None] = (),
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    compact_rows: bool | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """A row-local loss of a language-model head and its gradients: see ``reference.linear_token_loss``.

    Raises:
        ValueError: shapes disagree, or temperature, softcap or chunk_size is out of range.
    """
    _check_head(hidden, weight, targets, bias, temperature, softcap)
    if isinstance(rows, torch.Tensor):
        raise ValueError(f"rows is a tensor of shape {tuple(rows.shape)}: give a sequence of tensors, such as (rows,)")
    for i, row in enumerate(rows):
        if row is not None and len(row) != len(targets):
            raise ValueError(
                f"rows[{i}] has shape {tuple(row.shape)}: its first dimension must be the {len(targets)} targets"
            )
    return implementation(backend, hidden.device.type).linear_token_loss(
        hidden, weight, targets, loss_fn, rows, bias=bias, temperature=temperature, softcap=softcap,
        logit_scale=logit_scale, chunk_size=chunk_size, logits_dtype=logits_dtype, compact_rows=compact_rows,
        normalizer=normalizer,
    )  # fmt: skip


def gae(
    rewards: Float[Tensor, "A"],
    values: Float[Tensor, "A"],
    cu_seqlens: Int[Tensor, "B+1"],
    *,
    gamma: float = 1.0,
    lam: float | Float[Tensor, "B"] = 0.95,
    bootstrap: Float[Tensor, "B"] | None = None,
    mask: Bool[Tensor, "A"] | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """(advantages [A], returns [A]) over packed actions, and with ``return_stats`` the statistics: see
    ``reference.gae``.

    Raises:
        ValueError: shapes disagree.
    """
    sequences = len(cu_seqlens) - 1
    _check_rows(rewards.numel(), rewards=rewards, values=values, mask=mask)
    _check_rows(sequences, bootstrap=bootstrap, lam=lam if isinstance(lam, torch.Tensor) else None)
    return implementation(backend, rewards.device.type).gae(
        rewards, values, cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap, mask=mask, return_stats=return_stats
    )


def whitening_stats(
    x: Float[Tensor, "A"], *, mask: Bool[Tensor, "A"] | None = None, backend: str | None = None
) -> Float[Tensor, "3"]:
    """(count, mean, sum of squared deviations) of the unmasked entries: see ``reference.whitening_stats``."""
    _check_rows(x.numel(), x=x, mask=mask)
    return implementation(backend, x.device.type).whitening_stats(x, mask=mask)


def whiten(
    x: Float[Tensor, "A"],
    *,
    mask: Bool[Tensor, "A"] | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    stats: Float[Tensor, "3"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "A"]:
    """Zero mean and unit variance over the unmasked entries, from ``stats`` when given: see ``reference.whiten``."""
    _check_rows(x.numel(), x=x, mask=mask)
    return implementation(backend, x.device.type).whiten(x, mask=mask, shift_mean=shift_mean, eps=eps, stats=stats)


def ppo_loss(
    logp: Float[Tensor, "A"],
    old_logp: Float[Tensor, "A"],
    advantages: Float[Tensor, "A"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Float[Tensor, "A"] | None = None,
    ref_logp: Float[Tensor, "A"] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy: Float[Tensor, "A"] | None = None,
    entropy_coef: float = 0.0,
    values: Float[Tensor, "A"] | None = None,
    old_values: Float[Tensor, "A"] | None = None,
    returns: Float[Tensor, "A"] | None = None,
    value_coef: float = 0.5,
    value_clip: float | None = 0.2,
    mask: Bool[Tensor, "A"] | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
    backend: str | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The clipped PPO objective, its metrics and gradients: see ``reference.ppo_loss``.

    Raises:
        ValueError: shapes disagree, a coefficient is set whose tensor is missing, or dual_clip is not above 1.
    """
    _check_rows(
        logp.numel(), logp=logp, old_logp=old_logp, advantages=advantages, weights=weights, ref_logp=ref_logp,
        entropy=entropy, values=values, old_values=old_values, returns=returns, mask=mask,
    )  # fmt: skip
    return implementation(backend, logp.device.type).ppo_loss(
        logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, weights=weights,
        ref_logp=ref_logp, kl_coef=kl_coef, kl_estimator=kl_estimator, entropy=entropy, entropy_coef=entropy_coef,
        values=values, old_values=old_values, returns=returns, value_coef=value_coef, value_clip=value_clip, mask=mask,
        normalizer=normalizer,
    )  # fmt: skip
