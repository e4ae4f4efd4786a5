"""What every backend asks of its arguments, and how it calls a loss function of the user."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

TokenLoss = Callable[..., "tuple[Tensor, dict[str, Any]] | Tensor"]


class _Thread(threading.local):
    in_token_loss = False
    """Whether a ``loss_fn`` of ``linear_token_loss`` is running, whose vectors are a chunk of the actions."""


_thread = _Thread()


def rows_at(rows: Sequence[Tensor | None], chosen: slice) -> list[Tensor | None]:
    return [None if row is None else row[chosen] for row in rows]


def call_loss(loss_fn: TokenLoss, *columns: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, detached metrics) of a chunk's logp, entropy and rows.

    Raises:
        ValueError: the loss is not a scalar.
    """
    before, _thread.in_token_loss = _thread.in_token_loss, True
    try:
        out = loss_fn(*columns)
    finally:
        _thread.in_token_loss = before
    loss, metrics = (out, dict[str, Any]()) if isinstance(out, torch.Tensor) else out
    if loss.dim() != 0:
        raise ValueError(f"loss_fn returned a loss of shape {tuple(loss.shape)}: return the sum over its rows")
    return loss, {name: _metric(value, loss.device) for name, value in metrics.items()}


def _metric(value: Any, device: torch.device) -> Tensor:
    """A number is filled in on the device: a copy to it would wait."""
    return value.detach() if isinstance(value, torch.Tensor) else torch.full((), value, device=device)


def check_segments(cu_seqlens: Tensor, actions: int) -> None:
    """Raises ValueError unless ``cu_seqlens`` rises from 0 to the number of actions. Waits for its device."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != actions or (cu_seqlens.long().diff() < 0).any():
        raise ValueError(f"cu_seqlens {cu_seqlens.tolist()[:8]}: must rise from 0 to the {actions} actions")


def count_of(x: Tensor, mask: Tensor | None) -> int | Tensor:
    """How many entries are not masked, at least 1."""
    return max(x.shape[0], 1) if mask is None else mask.sum().clamp_min(1)


def check_normalizer(normalizer: float | Tensor | None) -> None:
    """Raises ValueError for a vector, which would divide a scalar loss into many."""
    if isinstance(normalizer, torch.Tensor) and normalizer.dim():
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: give a number, or a tensor of shape ()")


def check_ppo(
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ref_logp: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    entropy: Tensor | None,
    entropy_coef: float,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_clip: float | None,
    normalizer: float | Tensor | None,
) -> None:
    """Raises ValueError for options of ``ppo_loss`` that do not go together."""
    if normalizer is None and _thread.in_token_loss:
        raise ValueError(
            "ppo_loss would divide by the rows of one chunk: pass normalizer=1.0 inside linear_token_loss, which divides"
        )
    check_normalizer(normalizer)
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high), ("value_clip", value_clip)):
        if clip is not None and not clip >= 0.0:  # NaN neither
            raise ValueError(f"{name} {clip}: must be at least 0")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip {dual_clip}: must be above 1 (or None)")
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl estimator {kl_estimator!r}: choose k1, k2 or k3")
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef {kl_coef} needs ref_logp")
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {entropy_coef} needs entropy")
    if values is not None and (returns is None or (value_clip is not None and old_values is None)):
        raise ValueError("the value loss needs returns, and old_values unless value_clip is None")
