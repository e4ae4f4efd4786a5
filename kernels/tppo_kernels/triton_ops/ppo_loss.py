# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is called with launch options, and its body is Triton's language, not Python's.
"""The PPO objective with every optional term: loss, metrics and gradients in one launch, without a host sync."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..custom_ops import PpoInputs, PpoOptions, PpoResults
from .common import BLOCKS, counter, exp_minus_1, exp_minus_line, is_last_program, on_device, require_fp32

SUMS = 16
"""The loss and its 11 metrics, padded to a power of two."""


@triton.jit
def _read(ptr, i, inside, neutral):
    """The input at i, or ``neutral`` where the term is not used."""
    x = neutral
    if ptr is not None:
        x = tl.load(ptr + i, mask=inside, other=0.0)
    return x


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _put(row, k: tl.constexpr, slots, x):
    """Add the block's sum of x at slot k."""
    return tl.where(slots == k, tl.sum(x, 0), row)


@triton.jit(do_not_specialize=["actions", "programs"])
def ppo_kernel(
    logp_ptr, old_logp_ptr, advantages_ptr, weights_ptr, ref_logp_ptr, entropy_ptr, values_ptr, old_values_ptr,
    returns_ptr, mask_ptr, normalizer_ptr, count, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, value_coef, value_clip,
    actions, partial_ptr, loss_ptr, metrics_ptr, grad_logp_ptr, grad_values_ptr, counter_ptr, programs,
    KL: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    own = i < actions
    inside = own  # what is masked is read as 0, whatever stands there: then every term is 0, and the ratio 1
    if mask_ptr is not None:
        inside = own & (tl.load(mask_ptr + i, mask=own, other=0) != 0)
    divisor = count
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr)
    inverse = 1.0 / divisor
    slots = tl.arange(0, SUMS)
    row = tl.zeros([SUMS], tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)

    logp = tl.load(logp_ptr + i, mask=inside, other=0.0)
    a = tl.load(advantages_ptr + i, mask=inside, other=0.0)
    w = _read(weights_ptr, i, inside, zero + 1.0)
    log_ratio = logp - tl.load(old_logp_ptr + i, mask=inside, other=0.0)
    ratio = tl.exp(log_ratio)
    low, high = 1.0 - clip_low, 1.0 + clip_high
    unclipped, clipped = ratio * a, _clamp(ratio, low, high) * a
    is_low, is_high = (ratio < low) & (a < 0.0), (ratio > high) & (a > 0.0)
    policy = -tl.where(unclipped > clipped, clipped, unclipped)  # NaN stays NaN
    slope = tl.where(is_low | is_high, 0.0, -unclipped)
    bound = -dual_clip * a
    is_dual = (a < 0.0) & (policy > bound)
    policy = tl.where(is_dual, bound, policy) * w
    slope = tl.where(is_dual, 0.0, slope) * w

    kl = zero
    if ref_logp_ptr is not None:
        d = logp - tl.load(ref_logp_ptr + i, mask=inside, other=0.0)
        if KL == 1:
            kl = d
            kl_slope = zero + 1.0
        elif KL == 2:
            kl = 0.5 * d * d
            kl_slope = d
        else:
            shrunk = tl.exp(-d)
            kl = exp_minus_line(-d, shrunk)
            kl_slope = -exp_minus_1(-d, shrunk)
        slope += tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
    tl.store(grad_logp_ptr + i, tl.where(inside, slope * inverse, 0.0), mask=own)

    value, is_far = zero, zero
    if values_ptr is not None:
        v = tl.load(values_ptr + i, mask=inside, other=0.0)
        goal = tl.load(returns_ptr + i, mask=inside, other=0.0)
        error = v - goal
        value = error * error
        share = zero + 1.0
        if old_values_ptr is not None:
            old = tl.load(old_values_ptr + i, mask=inside, other=0.0)
            moved = v - old
            near_error = old - goal + _clamp(moved, -value_clip, value_clip)
            within = (moved <= value_clip) & (moved >= -value_clip)  # of NaN neither
            near = tl.where(within, value, near_error * near_error)
            is_far = tl.where(near > value, 1.0, 0.0)
            # torch.maximum gives each side half of the gradient where they are equal
            share = 1.0 - is_far - tl.where((near == value) & (within == 0), 0.5, 0.0)
            value = tl.where(value > near, value, near)
        value = 0.5 * value
        tl.store(grad_values_ptr + i, value_coef * inverse * error * share, mask=own)
    entropy = _read(entropy_ptr, i, inside, zero)

    loss = policy + value_coef * value + tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
    loss -= tl.where(entropy_coef != 0.0, entropy_coef * entropy, 0.0)
    row = _put(row, 0, slots, loss)
    row = _put(row, 1, slots, policy)
    row = _put(row, 2, slots, value)
    row = _put(row, 3, slots, kl)
    row = _put(row, 4, slots, entropy)
    row = _put(row, 5, slots, tl.where(inside, ratio, 0.0))
    row = _put(row, 6, slots, tl.where(inside, ratio * ratio, 0.0))
    row = _put(row, 7, slots, exp_minus_line(log_ratio, ratio))
    row = _put(row, 8, slots, is_low.to(tl.float32))
    row = _put(row, 9, slots, is_high.to(tl.float32))
    row = _put(row, 10, slots, is_dual.to(tl.float32))
    row = _put(row, 11, slots, is_far)
    tl.store(partial_ptr + program * SUMS + slots, row)
    if is_last_program(counter_ptr, programs):
        total = tl.zeros([MERGE, SUMS], tl.float32)
        for start in range(0, programs, MERGE):
            k = start + tl.arange(0, MERGE)
            at = partial_ptr + k[:, None] * SUMS + slots[None, :]
            total += tl.load(at, mask=(k < programs)[:, None], other=0.0, cache_modifier=".cg")
        sums = tl.sum(total, 0)
        tl.store(loss_ptr, tl.sum(tl.where(slots == 0, sums, 0.0), 0) * inverse)
        tl.store(metrics_ptr + slots - 1, sums, mask=(slots > 0) & (slots < 12))


def ppo(inputs: PpoInputs, options: PpoOptions, normalizer: Tensor | None, count: float, results: PpoResults) -> None:
    logp, (loss, metrics, grad_logp, grad_values) = require_fp32(inputs.logp), results
    size, warps = BLOCKS["ppo"]
    programs = triton.cdiv(len(logp), size)
    if not programs:
        loss.zero_()
        metrics.zero_()
        return
    partial = logp.new_empty(programs, SUMS)
    mask = None if inputs.mask is None else inputs.mask.view(torch.uint8)
    with on_device(logp):
        ppo_kernel[(programs,)](
            *inputs[:-1], mask, normalizer, count, *options[:-1], len(logp), partial, loss, metrics, grad_logp,
            None if inputs.values is None else grad_values, counter(logp), programs, KL=options.kl_estimator, BLOCK=size,
            SUMS=SUMS, MERGE=256, num_warps=warps,
        )  # fmt: skip
