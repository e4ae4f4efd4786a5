# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is called with launch options, and its body is Triton's language, not Python's.
"""What the Triton kernels share: block sizes, device functions, launch helpers. Equations: ``reference``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS: dict[str, tuple[int, int]] = {
    "row_forward": (8192, 8),
    "row_backward": (2048, 4),
    "live_rows": (1024, 4),
    "gae": (1024, 4),
    "stats": (4096, 8),
    "ppo": (2048, 8),
}
"""Entries and warps of a program, per kernel."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))


def require_fp32(x: Tensor) -> Tensor:
    """``x``, unless it is float64."""
    if x.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32: use backend='reference' for float64")
    return x


def unit_stride(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the tensor's own GPU, not on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def counter(x: Tensor) -> Tensor:
    """An int32 zero of one launch's own: kept for the next one, it would be shared by CUDA graphs that replay side by side."""
    return torch.zeros(1, dtype=torch.int32, device=x.device)


@triton.jit
def is_last_program(counter_ptr, programs):
    """True in the program that finishes last, which then sees what every other one stored."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1


@triton.jit
def exp_tail(x):
    """exp(x) - 1 - x without cancellation for |x| <= 0.35 (Taylor to x^8: the rest is below 1e-9)."""
    p = 1.0 / 40320.0
    p = p * x + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    return (p * x + 0.5) * x * x


@triton.jit
def exp_minus_line(x, y):
    """exp(x) - 1 - x, where y is exp(x)."""
    return tl.where(tl.abs(x) < 0.35, exp_tail(x), y - 1.0 - x)


@triton.jit
def exp_minus_1(x, y):
    """exp(x) - 1, where y is exp(x)."""
    return tl.where(tl.abs(x) < 0.35, exp_tail(x) + x, y - 1.0)


@triton.jit
def tanh(x):
    """Without libdevice: an odd polynomial below 0.4 (Taylor to x^13), exponentials above."""
    s = x * x
    p = 21844.0 / 6081075.0
    p = p * s - 1382.0 / 155925.0
    p = p * s + 62.0 / 2835.0
    p = p * s - 17.0 / 315.0
    p = p * s + 2.0 / 15.0
    p = p * s - 1.0 / 3.0
    a = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.4, p * s * x + x, tl.where(x < 0.0, -large, large))
