# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is called with launch options, and its body is Triton's language, not Python's.
"""Log-probability and entropy of every row in one read of the logits, and their gradient, possibly in place.

Everything inside is in base 2: x * (factor * log2 e) - m is one fused multiply-add, and exp2 one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import LogitOptions, Rows
from .common import LN2, LOG2E, NEG_INF, block, exp_minus_1, on_device, tanh
from .live_rows import products


@triton.jit
def _transform(x, inner, outer, CAPPED: tl.constexpr):
    """z log2(e), where outer carries log2(e); without a cap inner is 1 and z = outer x."""
    return outer * tanh(inner * x) if CAPPED else outer * x


@triton.jit
def _add_block(z, m, s, w):
    """Add a block to the running maximum m (a scalar) and to the sums s of 2^(z-m) and w of 2^(z-m) (z-m), per lane."""
    top = tl.maximum(m, tl.max(z, 0))
    if top > m:  # rare after the first blocks
        old = tl.where(m > NEG_INF, m, top)
        scale = tl.exp2(old - top)
        w = (w + s * (old - top)) * scale
        s = s * scale
    d = z - tl.where(top > NEG_INF, top, 0.0)
    e = tl.exp2(d)
    return top, s + e, w + e * tl.where(d < -1e30, -1e30, d)  # 0 * -inf is 0 here, NaN stays NaN


@triton.jit
def row_forward(
    x_ptr, target_ptr, logp_ptr, entropy_ptr, lse_ptr, vocab, row_stride, inner, outer,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * row_stride  # A * V passes 2^31
    columns = tl.arange(0, BLOCK)
    m = NEG_INF
    s = tl.zeros([BLOCK], tl.float32)
    w = tl.zeros([BLOCK], tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = _transform(tl.load(x_ptr + start + columns).to(tl.float32), inner, outer, CAPPED)
        m, s, w = _add_block(z, m, s, w)
    if whole < vocab:
        inside = whole + columns < vocab
        x = tl.load(x_ptr + whole + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, _transform(x, inner, outer, CAPPED), NEG_INF)
        m, s, w = _add_block(z, m, s, w)
    total = tl.sum(s, 0)
    log_total = tl.log2(total)
    y = tl.load(target_ptr + row).to(tl.int64)
    xy = tl.load(x_ptr + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)
    tl.store(logp_ptr + row, (_transform(xy, inner, outer, CAPPED) - m - log_total) * LN2)
    tl.store(entropy_ptr + row, (log_total - tl.sum(w, 0) / total) * LN2)
    tl.store(lse_ptr + row, (m + log_total) * LN2)


@triton.jit(do_not_specialize=["blocks"])
def row_backward(
    x_ptr, target_ptr, logp_ptr, entropy_ptr, lse_ptr, grad_logp_ptr, grad_entropy_ptr, out_ptr, vocab, row_stride,
    out_stride, blocks, inner, outer, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks  # rows and blocks on the x axis alone: y and z end at 65,535
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    c, e = 0.0, 0.0
    if grad_logp_ptr is not None:
        c = tl.load(grad_logp_ptr + row)
    if grad_entropy_ptr is not None:
        e = tl.load(grad_entropy_ptr + row)
    x_ptr += row.to(tl.int64) * row_stride
    out_ptr += row.to(tl.int64) * out_stride + columns
    if (c == 0.0) & (e == 0.0):  # nothing to read
        tl.store(out_ptr, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=inside)
        return
    y = tl.load(target_ptr + row)
    logp, entropy = tl.load(logp_ptr + row), tl.load(entropy_ptr + row)
    lse = tl.load(lse_ptr + row) * LOG2E
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        t = tanh(inner * x)
        d = outer * t - lse
        slope = outer * LN2 * inner * (1.0 - t * t)
    else:
        d = outer * x - lse
        slope = outer * LN2
    p = tl.exp2(d)
    d = tl.where(d < -1e30, -1e30, d) * LN2
    dz = -p * (c + e * (d + entropy))
    logp = tl.where(logp < -1e30, -1e30, logp)
    py = tl.exp(logp)
    dz_target = -c * exp_minus_1(logp, py) - e * py * (logp + entropy)  # 1 - p without cancellation
    dz = tl.where(columns == y, dz_target, dz) * slope
    tl.store(out_ptr, dz.to(out_ptr.dtype.element_ty), mask=inside)


def _folded(options: LogitOptions) -> tuple[bool, float, float]:
    """(capped, inner, outer) of ``_transform``."""
    if options.softcap:
        scale = options.softcap / options.temperature
        return True, options.logit_scale / options.softcap, scale * LOG2E.value
    return False, 1.0, options.logit_scale / options.temperature * LOG2E.value


def _one_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def forward(logits: Tensor, targets: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32: use backend='reference' for float64")
    logits, targets = _one_stride(logits), targets.contiguous()
    rows, vocab = logits.shape
    logp, entropy, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    size, warps = block("row_forward")
    capped, inner, outer = _folded(options)
    if rows:
        with on_device(logits):
            row_forward[(rows,)](
                logits, targets, logp, entropy, lse, vocab, logits.stride(0), inner, outer,
                CAPPED=capped, BLOCK=size, num_warps=warps,
            )  # fmt: skip
    return logp, entropy, lse


def backward(
    logits: Tensor, targets: Tensor, saved: tuple[Tensor, Tensor, Tensor], grad_logp: Tensor | None,
    grad_entropy: Tensor | None, out: Tensor, options: LogitOptions,
) -> None:  # fmt: skip
    source, target = _one_stride(logits), out if out.stride(1) == 1 else torch.empty_like(out).contiguous()
    rows, vocab = source.shape
    size, warps = block("row_backward")
    capped, inner, outer = _folded(options)
    blocks = triton.cdiv(vocab, size)
    vectors = [None if x is None else x.float().contiguous() for x in (*saved, grad_logp, grad_entropy)]
    if rows:
        with on_device(logits):
            row_backward[(rows * blocks,)](
                source, targets.contiguous(), *vectors, target, vocab, source.stride(0), target.stride(0), blocks,
                inner, outer, CAPPED=capped, BLOCK=size, num_warps=warps,
            )  # fmt: skip
    if target is not out:
        out.copy_(target)


rows = Rows(forward, backward, products)
