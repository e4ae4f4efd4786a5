"""The public ops: argument checks, then the chosen backend. The equations stand in ``reference``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from . import reference
from .backend import implementation
from .checks import TokenLoss, check_normalizer
from .reference import KLEstimator

if TYPE_CHECKING:
    from types import ModuleType

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _implementation(backend: str | None, **inputs: Tensor | None) -> ModuleType:
    """The backend's module for the inputs' device.

    Raises:
        ValueError: they are not all on one: a kernel would read an address of another memory.
        NotImplementedError: one has a forward-mode derivative, which a fused backend would drop.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    first, device = next((name, x.device) for name, x in given.items())
    for name, x in given.items():
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and {first} on {device}: move them to one device")
    module = implementation(backend, device.type)
    if forward_ad._current_level >= 0 and module is not reference:
        for x in given.values():
            if forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError("the fused ops have no forward-mode derivative: use backend='reference'")
    return module


def _check_logits(
    name: str, logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, logit_scale: float
) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)} and targets {tuple(targets.shape)}: give one row per target"
        )
    if not logits.shape[1]:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}: its rows have no entry")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets are {targets.dtype}: give token ids, as integers")
    _check_float(name, logits.dtype)
    if not 0.0 < temperature < math.inf:  # NaN neither
        raise ValueError(f"temperature {temperature}: must be above 0 and finite")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap {softcap}: must be above 0 and finite (or None)")
    if not 0.0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale {logit_scale}: must be finite and not 0")


def _check_float(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"{name}: {dtype} is none of {', '.join(map(str, DTYPES))}")


def _check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None,
    logit_scale: float, logits_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    _check_logits("hidden", hidden, targets, temperature, softcap, logit_scale)
    _check_float("weight", weight.dtype)
    _check_float("logits_dtype", logits_dtype)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (vocabulary, {hidden.shape[1]}), as hidden")
    if not len(weight):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: the vocabulary has no token")
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
        ValueError: shapes or devices disagree, temperature, softcap or logit_scale is out of range, or
            ``inplace_backward`` would overwrite a parameter.
        TypeError: logits are no floats of 16, 32 or 64 bits.
    """
    _check_logits("logits", logits, targets, temperature, softcap, logit_scale)
    if inplace_backward and logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "inplace_backward would overwrite logits that are a leaf with a gradient of its own: pass False, or what is"
            " computed from it"
        )
    return _implementation(backend, logits=logits, targets=targets).logprobs_from_logits(
        logits, targets.long(), temperature=temperature, softcap=softcap, logit_scale=logit_scale,
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
        ValueError: shapes or devices disagree, or temperature, softcap, logit_scale or chunk_size is out of range.
        TypeError: hidden, weight or logits_dtype are no floats of 16, 32 or 64 bits.
    """
    _check_head(hidden, weight, targets, bias, temperature, softcap, logit_scale, logits_dtype)
    return _implementation(backend, hidden=hidden, weight=weight, targets=targets, bias=bias).linear_logprobs(
        hidden, weight, targets.long(), bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
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
        ValueError: shapes or devices disagree, or temperature, softcap, logit_scale or chunk_size is out of range.
        TypeError: hidden, weight or logits_dtype are no floats of 16, 32 or 64 bits.
    """
    _check_head(hidden, weight, targets, bias, temperature, softcap, logit_scale, logits_dtype)
    if isinstance(rows, torch.Tensor):
        raise ValueError(f"rows is a tensor of shape {tuple(rows.shape)}: give a sequence of tensors, such as (rows,)")
    for i, row in enumerate(rows):
        if row is not None and row.shape[:1] != targets.shape:
            raise ValueError(
                f"rows[{i}] has shape {tuple(row.shape)}: its first dimension must be the {len(targets)} targets"
            )
    check_normalizer(normalizer)
    inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
    inputs |= {f"rows[{i}]": row for i, row in enumerate(rows)}
    return _implementation(backend, **inputs).linear_token_loss(
        hidden, weight, targets.long(), loss_fn, rows, bias=bias, temperature=temperature, softcap=softcap,
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
        ValueError: shapes or devices disagree; on a CPU also ``cu_seqlens`` that do not rise from 0 to A.
    """
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0] or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens are {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: give B + 1 integers (int32 or int64),"
            " the first one 0"
        )
    sequences = cu_seqlens.shape[0] - 1
    if not sequences and rewards.numel():
        raise ValueError(
            f"cu_seqlens has one entry and so no sequence: it must rise from 0 to the {rewards.numel()} actions"
        )
    lams = lam if isinstance(lam, torch.Tensor) else None
    _check_rows(rewards.numel(), rewards=rewards, values=values, mask=mask)
    _check_rows(sequences, bootstrap=bootstrap, lam=lams)
    module = _implementation(
        backend, rewards=rewards, values=values, cu_seqlens=cu_seqlens, lam=lams, bootstrap=bootstrap, mask=mask
    )  # fmt: skip
    return module.gae(
        rewards, values, cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap, mask=mask, return_stats=return_stats
    )


def whitening_stats(
    x: Float[Tensor, "A"], *, mask: Bool[Tensor, "A"] | None = None, backend: str | None = None
) -> Float[Tensor, "3"]:
    """(count, mean, sum of squared deviations) of the unmasked entries: see ``reference.whitening_stats``."""
    _check_rows(x.numel(), x=x, mask=mask)
    return _implementation(backend, x=x, mask=mask).whitening_stats(x, mask=mask)


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
    _check_rows(3, stats=stats)
    return _implementation(backend, x=x, mask=mask, stats=stats).whiten(
        x, mask=mask, shift_mean=shift_mean, eps=eps, stats=stats
    )


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
        ValueError: shapes or devices disagree, a coefficient is set whose tensor is missing, a clip is negative, or
            dual_clip is not above 1.
    """
    vectors = {
        "logp": logp, "old_logp": old_logp, "advantages": advantages, "weights": weights, "ref_logp": ref_logp,
        "entropy": entropy, "values": values, "old_values": old_values, "returns": returns, "mask": mask,
    }  # fmt: skip
    _check_rows(logp.numel(), **vectors)
    return _implementation(backend, **vectors).ppo_loss(
        **vectors, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef,
        kl_estimator=kl_estimator, entropy_coef=entropy_coef, value_coef=value_coef, value_clip=value_clip,
        normalizer=normalizer,
    )  # fmt: skip
