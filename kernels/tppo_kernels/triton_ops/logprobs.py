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

from .. import reference
from ..custom_ops import LogitOptions, Rows
from .common import BLOCKS, LN2, LOG2E, NEG_INF, exp_minus_1, on_device, require_fp32, tanh, unit_stride
from .live_rows import products

IGNORED = tl.constexpr(reference.IGNORED)


@triton.jit
def _bounded(x, inner, CAPPED: tl.constexpr, FLIPPED: tl.constexpr):
    """u, where z log2(e) = outer u and outer > 0."""
    if CAPPED:
        u = tanh(inner * x)
    elif FLIPPED:  # a negative logit_scale
        u = -x
    else:
        u = x
    return u


@triton.jit
def _add_block(u, m, s, w, outer):
    """Add a block [R, K] to each of R lanes: to the maximum m of u and the sums s of 2^d and w of 2^d d, d = outer (u - m).

    A lane's K entries lie in one thread, so that nothing is exchanged. u - m before the product: the target's d is exactly
    0 where it is the maximum.
    """
    top = tl.maximum(m, tl.max(u, 1))
    base = tl.where(top > NEG_INF, top, 0.0)
    moved = outer * (m - base)
    scale = tl.exp2(moved)
    d = outer * (u - base[:, None])
    e = tl.exp2(d)
    w = (w + s * tl.maximum(moved, -1e30)) * scale + tl.sum(e * tl.maximum(d, -1e30), 1)  # 0 * -inf is 0 here
    return top, s * scale + tl.sum(e, 1), w


@triton.jit
def row_forward(
    x_ptr, target_ptr, logp_ptr, entropy_ptr, lse_ptr, vocab, row_stride, inner, outer,
    CAPPED: tl.constexpr, FLIPPED: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * row_stride  # A * V passes 2^31
    BLOCK: tl.constexpr = LANES * EACH
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    m = tl.full([LANES], NEG_INF, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    w = tl.zeros([LANES], tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        u = _bounded(tl.load(x_ptr + start + columns).to(tl.float32), inner, CAPPED, FLIPPED)
        m, s, w = _add_block(u, m, s, w, outer)
    if whole < vocab:
        inside = whole + columns < vocab
        x = tl.load(x_ptr + whole + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.where(inside, _bounded(x, inner, CAPPED, FLIPPED), NEG_INF)
        m, s, w = _add_block(u, m, s, w, outer)
    top = tl.max(m, 0)
    moved = outer * (m - tl.where(top > NEG_INF, top, 0.0))
    scale = tl.exp2(moved)
    total = tl.sum(s * scale, 0)
    weighted = tl.sum((w + s * tl.maximum(moved, -1e30)) * scale, 0)
    log_total = tl.log2(total)
    y = tl.load(target_ptr + row).to(tl.int64)
    counts = y != IGNORED  # returning at once for such a row costs a softcapped kernel a fourth more registers
    xy = tl.load(x_ptr + y, mask=(y >= 0) & (y < vocab), other=float("nan")).to(tl.float32)
    logp = (outer * (_bounded(xy, inner, CAPPED, FLIPPED) - top) - log_total) * LN2
    tl.store(logp_ptr + row, tl.where(counts, logp, 0.0))
    tl.store(entropy_ptr + row, tl.where(counts, (log_total - weighted / total) * LN2, 0.0))
    tl.store(lse_ptr + row, (outer * top + log_total) * LN2)


@triton.jit
def _store(out_ptr, x, inside, whole, RAGGED: tl.constexpr):
    """Masks of a vocabulary that is no multiple of 16 fall apart into entries: a whole block has none."""
    x = x.to(out_ptr.dtype.element_ty)
    if RAGGED:
        if whole:
            tl.store(out_ptr, x)
        else:
            tl.store(out_ptr, x, mask=inside)
    else:
        tl.store(out_ptr, x, mask=inside)


@triton.jit
def _load(x_ptr, inside, whole, RAGGED: tl.constexpr):
    """See ``_store``."""
    if RAGGED:
        if whole:  # noqa: SIM108 - the whole program takes one branch
            x = tl.load(x_ptr)
        else:
            x = tl.load(x_ptr, mask=inside, other=0.0)
    else:
        x = tl.load(x_ptr, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["blocks"])
def row_backward(
    x_ptr, target_ptr, logp_ptr, entropy_ptr, lse_ptr, grad_logp_ptr, grad_entropy_ptr, out_ptr, vocab, row_stride,
    out_stride, blocks, inner, outer, CAPPED: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks  # rows and blocks on the x axis alone: y and z end at 65,535
    first = tl.program_id(0) % blocks * BLOCK
    columns = first + tl.arange(0, BLOCK)
    inside, whole = columns < vocab, first + BLOCK <= vocab
    c, e = 0.0, 0.0
    if grad_logp_ptr is not None:
        c = tl.load(grad_logp_ptr + row)
    if grad_entropy_ptr is not None:
        e = tl.load(grad_entropy_ptr + row)
    x_ptr += row.to(tl.int64) * row_stride
    out_ptr += row.to(tl.int64) * out_stride + columns
    y = tl.load(target_ptr + row).to(tl.int64)
    if ((c == 0.0) & (e == 0.0)) | (y == IGNORED):  # nothing to read
        _store(out_ptr, tl.zeros([BLOCK], tl.float32), inside, whole, RAGGED)
        return
    c = tl.where((y >= 0) & (y < vocab), c, float("nan"))  # no token: its log-probability is NaN too
    logp, entropy = tl.load(logp_ptr + row), tl.load(entropy_ptr + row)
    lse = tl.load(lse_ptr + row) * LOG2E
    x = _load(x_ptr + columns, inside, whole, RAGGED)
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
    _store(out_ptr, dz, inside, whole, RAGGED)


def _folded(options: LogitOptions) -> tuple[bool, float, float]:
    """(capped, inner, outer): z log2(e) is outer tanh(inner x), or without a cap outer x."""
    if options.softcap:
        scale = options.softcap / options.temperature
        return True, options.logit_scale / options.softcap, scale * LOG2E.value
    return False, 1.0, options.logit_scale / options.temperature * LOG2E.value


def forward(logits: Tensor, targets: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = unit_stride(require_fp32(logits)), targets.contiguous()
    rows, vocab = logits.shape
    logp, entropy, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    size, warps = BLOCKS["row_forward"]
    each = 16 // logits.element_size()  # a vector load
    capped, inner, outer = _folded(options)
    if rows:
        with on_device(logits):
            row_forward[(rows,)](
                logits, targets, logp, entropy, lse, vocab, logits.stride(0), inner, abs(outer),
                CAPPED=capped, FLIPPED=outer < 0.0, LANES=size // each, EACH=each, num_warps=warps,
            )  # fmt: skip
    return logp, entropy, lse


def backward(
    logits: Tensor, targets: Tensor, saved: tuple[Tensor, Tensor, Tensor], grad_logp: Tensor | None,
    grad_entropy: Tensor | None, out: Tensor, options: LogitOptions,
) -> None:  # fmt: skip
    source, target = unit_stride(logits), out if out.stride(1) == 1 else torch.empty_like(out).contiguous()
    rows, vocab = source.shape
    size, warps = BLOCKS["row_backward"]
    capped, inner, outer = _folded(options)
    blocks = triton.cdiv(vocab, size)
    vectors = [None if x is None else x.float().contiguous() for x in (*saved, grad_logp, grad_entropy)]
    if rows:
        with on_device(logits):
            row_backward[(rows * blocks,)](
                source, targets.contiguous(), *vectors, target, vocab, source.stride(0), target.stride(0), blocks,
                inner, outer, CAPPED=capped, RAGGED=vocab % 16 != 0, BLOCK=size, num_warps=warps,
            )  # fmt: skip
    if target is not out:
        out.copy_(target)


rows = Rows(forward, backward, products)
