# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is called with launch options, and its body is Triton's language, not Python's.
"""The head's two gradient GEMMs over the rows that have a gradient, whose number only the device knows.

    index, n = the rows with c != 0 or e != 0, in order           one program, a running prefix sum
    dX[index] = dz[index] @ W                                     tiles of rows past n exit at once
    dW (+)= dz[index]^T @ X[index]                                n steps of the sum instead of C

Rows are gathered while they are loaded, so nothing is moved first. No host sync, no atomics: the same inputs give the
same bits. dz comes in the dtype of 16-bit W and X, as in the dense path; sums are fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..custom_ops import LiveRows, RowProducts
from .common import BLOCKS, on_device, unit_stride


class Tiles(NamedTuple):
    """One GEMM's tile [rows, columns], its step along the sum, and how it is run."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


TILES = {
    "d_hidden": Tiles(128, 128, 64, 8, 3),
    "d_hidden, Hopper": Tiles(128, 256, 64, 8, 3),
    "d_weight": Tiles(128, 128, 64, 8, 3),
    "float": Tiles(64, 64, 32, 4, 2),
}
"""16-bit operands go to the tensor cores; fp32 ones ("float") are multiplied in full fp32 (no TF32)."""


def is_hopper(device: torch.device) -> bool:
    """Whether a GPU has Hopper's shared memory and asynchronous tensor cores, or newer ones."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _tiles(gemm: str, operand: Tensor) -> Tiles:
    if operand.dtype == torch.float32:
        return TILES["float"]
    hopper = f"{gemm}, Hopper"
    return TILES[hopper if hopper in TILES and is_hopper(operand.device) else gemm]


@triton.jit(do_not_specialize=["rows"])
def live_rows_kernel(c_ptr, e_ptr, rows, index_ptr, count_ptr, BLOCK: tl.constexpr):
    found = tl.zeros([], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        live = row < 0
        if c_ptr is not None:
            live = live | (tl.load(c_ptr + row, mask=inside, other=0.0) != 0.0)
        if e_ptr is not None:
            live = live | (tl.load(e_ptr + row, mask=inside, other=0.0) != 0.0)
        one = live.to(tl.int32)
        tl.store(index_ptr + found + tl.cumsum(one, 0) - one, row, mask=live)
        found += tl.sum(one, 0)
    tl.store(count_ptr, found)


@triton.jit
def d_hidden_kernel(
    dz_ptr, weight_ptr, index_ptr, count_ptr, out_ptr, vocab, size, dz_stride, weight_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(size, COLUMNS)
    first = tl.program_id(0) // across * ROWS  # programs that share rows of dz run side by side
    count = tl.load(count_ptr)
    if first >= count:
        return
    at = first + tl.arange(0, ROWS)
    live = (at < count)[:, None]
    row = tl.load(index_ptr + at, mask=at < count, other=0).to(tl.int64)[:, None]
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    k = tl.arange(0, STEP)
    dz_ptr += row * dz_stride + k[None, :]
    weight_ptr += k[:, None].to(tl.int64) * weight_stride + column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, vocab, STEP):
        left = vocab - start
        dz = tl.load(dz_ptr, mask=live & (k < left)[None, :], other=0.0)
        w = tl.load(weight_ptr, mask=(k < left)[:, None] & (column < size), other=0.0)
        total = tl.dot(dz.to(w.dtype), w, total, input_precision="ieee")
        dz_ptr += STEP
        weight_ptr += tl.full([], STEP, tl.int64) * weight_stride  # a stride of 1 is a constant without a type
    out_ptr += row * out_stride + column
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=live & (column < size))


@triton.jit
def d_weight_kernel(
    dz_ptr, hidden_ptr, index_ptr, count_ptr, out_ptr, vocab, size, dz_stride, hidden_stride, out_stride,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    if ACCUMULATE:  # noqa: SIM102 - known to the compiler, and the count to the device alone
        if count == 0:
            return
    across = tl.cdiv(size, COLUMNS)  # programs that share a strip of dz run side by side: it is read once
    token = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    ahead = tl.load(index_ptr + k, mask=k < count, other=0)
    for start in range(0, count, STEP):
        live = start + k < count
        row = ahead.to(tl.int64)[:, None]
        ahead = tl.load(index_ptr + start + STEP + k, mask=start + STEP + k < count, other=0)
        dz = tl.load(
            dz_ptr + row * dz_stride + token[None, :], mask=live[:, None] & (token < vocab)[None, :], other=0.0
        )
        x = tl.load(
            hidden_ptr + row * hidden_stride + column[None, :], mask=live[:, None] & (column < size)[None, :], other=0.0
        )
        total = tl.dot(tl.trans(dz.to(x.dtype)), x, total, input_precision="ieee")
    inside = (token < vocab)[:, None] & (column < size)[None, :]
    out_ptr += token[:, None].to(tl.int64) * out_stride + column[None, :]
    if ACCUMULATE:
        total += tl.load(out_ptr, mask=inside, other=0.0)
    tl.store(out_ptr, total, mask=inside)


def find(c: Tensor | None, e: Tensor | None) -> LiveRows:
    present = c if c is not None else e
    assert present is not None
    rows = len(present)
    index, count = (torch.empty(n, dtype=torch.int32, device=present.device) for n in (rows, 1))
    vectors = [None if x is None else x.float().contiguous() for x in (c, e)]
    size, warps = BLOCKS["live_rows"]
    with on_device(present):
        live_rows_kernel[(1,)](*vectors, rows, index, count, BLOCK=size, num_warps=warps)
    return LiveRows(index, count)


def d_hidden(dz: Tensor, weight: Tensor, live: LiveRows, out: Tensor) -> None:
    weight = unit_stride(weight)
    vocab, size = weight.shape
    tiles = _tiles("d_hidden", weight)
    grid = (triton.cdiv(len(dz), tiles.rows) * triton.cdiv(size, tiles.columns),)
    with on_device(dz):
        d_hidden_kernel[grid](
            dz, weight, *live, out, vocab, size, dz.stride(0), weight.stride(0), out.stride(0), ROWS=tiles.rows,
            COLUMNS=tiles.columns, STEP=tiles.step, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def d_weight(dz: Tensor, hidden: Tensor, live: LiveRows, out: Tensor, accumulate: bool) -> None:
    hidden = unit_stride(hidden)
    vocab, size = out.shape
    tiles = _tiles("d_weight", hidden)
    grid = (triton.cdiv(vocab, tiles.rows) * triton.cdiv(size, tiles.columns),)
    with on_device(dz):
        d_weight_kernel[grid](
            dz, hidden, *live, out, vocab, size, dz.stride(0), hidden.stride(0), out.stride(0), ACCUMULATE=accumulate,
            ROWS=tiles.rows, COLUMNS=tiles.columns, STEP=tiles.step, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


products = RowProducts(find, d_hidden, d_weight)
