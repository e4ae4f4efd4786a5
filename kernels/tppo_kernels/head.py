"""A language-model head by chunks of rows: logits in ONE reused buffer, and dX, dW, db with fp32 sums.

Rows whose two gradient scalars are 0 (masked, or clipped by PPO) add nothing to dX and dW. ``compact_rows`` says whether
the two gradient GEMMs leave them out:

- None, the default: yes where the live rows can be counted for nothing, on a CPU; no elsewhere.
- True: yes everywhere. On an accelerator the count stays on the device: a prefix sum finds the live rows and the
  backend's own GEMMs read their number there, so nothing waits for it. These are not cuBLAS: on an H200 dX runs at its
  rate and dW at half of it, so they pay where a third of the rows or more is dead. ``benchmarks.gpu_check`` measures that.
- False: never.

All three give the same values of finite hidden states up to the order of fp32 sums (0 * NaN of a row that is not left out is NaN
in dW, as in any GEMM); log-probabilities do not depend on it, to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .custom_ops import LiveRows, LogitOptions, RowProducts, Rows, compute_dtype
from .reference import IGNORED, chunk_rows

MIXED_GEMM = getattr(torch.ops.aten.addmm, "dtype_out", None)
"""out (fp32) = beta * out + a @ b for 16-bit a, b, on CUDA: in every torch that is supported, 2.11 to 2.13."""
if MIXED_GEMM is None and (torch.version.cuda or torch.version.hip):
    warnings.warn(
        f"torch {torch.__version__} has no GEMM with fp32 results of 16-bit operands: the head widens its operands to"
        " fp32, several times slower on a GPU; install torch 2.11 or newer",
        stacklevel=2,
    )


def product(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> None:
    """out = a @ b + beta * out, summed in fp32 (fp64) whatever the operands; ``beta`` 0 ignores what ``out`` holds."""
    if out.is_cuda and b.dtype.itemsize == 2 and out.dtype == torch.float32 and MIXED_GEMM is not None:
        MIXED_GEMM(out, a.to(b.dtype), b, out.dtype, beta=beta, out=out)
    elif a.dtype == b.dtype == out.dtype or out.is_cuda:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
    else:
        wide = compute_dtype(out.dtype)
        result = out.new_empty(out.shape, dtype=wide)
        torch.mm(a.to(wide), b.to(wide), out=result)  # with out=, autocast leaves the precision alone
        out.copy_(result if beta == 0.0 else result.add_(out, alpha=beta))


class HeadOptions(NamedTuple):
    """See ``reference.linear_logprobs``, in the order of the custom ops' arguments."""

    temperature: float
    softcap: float
    logit_scale: float
    chunk_size: int | None
    logits_dtype: torch.dtype | None
    compact_rows: bool | None

    @property
    def logits(self) -> LogitOptions:
        return LogitOptions(*self[:3])


class RowVectors(NamedTuple):
    """What the row kernels know of a chunk's rows, each [C]; a gradient that is None is 0."""

    targets: Tensor
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    grad_logp: Tensor | None
    grad_entropy: Tensor | None

    def at(self, chosen: slice | Tensor) -> RowVectors:
        return RowVectors(*(None if v is None else v[chosen] for v in self))  # pyright: ignore[reportArgumentType]


class Head:
    """One call's chunks of logits and its gradients: dX in hidden's dtype (a row is written once), dW and db wide."""

    def __init__(self, rows: Rows, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions):
        weight = weight.to(hidden.dtype)  # once a call: fp32 masters are rounded, a 16-bit weight under fp32 is widened
        dtype = options.logits_dtype or hidden.dtype
        self.rows, self.hidden, self.bias, self.options = rows, hidden, bias, options
        if not self._on_device and dtype.itemsize > weight.dtype.itemsize:
            weight = weight.to(dtype)  # a CPU multiplies one dtype: once, not for each chunk
        self.weight = weight
        self.size = chunk_rows(options.chunk_size, len(weight), dtype, hidden.device)
        self.buffer = _aligned(weight, min(self.size, len(hidden)), dtype)
        self.rounded: Tensor | None = None
        """dz as 16-bit GEMMs read it, where the logits are wider: rounded once, and by the kernel that makes it."""
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        self.started = False

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Allocate the gradients that are asked for."""
        wide = compute_dtype(self.weight.dtype)
        if (hidden or weight) and self._rounds():
            self.rounded = _aligned(self.weight, len(self.buffer), self.weight.dtype)
        if hidden:
            self.d_hidden = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        if weight:
            self.d_weight = self.weight.new_empty(self.weight.shape, dtype=wide)
        if bias:
            self.d_bias = self.weight.new_zeros(len(self.weight), dtype=wide)

    def _rounds(self) -> bool:
        """Whether the gradients' GEMMs read dz in the 16 bits of their other operand: cuBLAS and Triton do, a CPU widens."""
        return self._on_device and self.weight.dtype.itemsize == 2 and self.buffer.dtype.itemsize > 2

    @property
    def _on_device(self) -> bool:
        return self.hidden.device.type != "cpu" or self._counts_on_device

    @property
    def _counts_on_device(self) -> bool:
        return bool(self.options.compact_rows) and self.rows.products is not None

    def chunks(self) -> Iterator[slice]:
        for start in range(0, max(len(self.hidden), 1), self.size):
            yield slice(start, start + self.size)

    def logits(self, where: slice | Tensor) -> Tensor:
        """Those of some rows, at most one chunk, in the buffer."""
        hidden = self.hidden[where]
        out = self.buffer[: len(hidden)]
        product(hidden, self.weight.t(), out)
        return out if self.bias is None else out.add_(self.bias)

    def add_gradients(self, chosen: slice, vectors: RowVectors, logits: Tensor | None = None) -> None:
        """Add one chunk's dX, dW and db. ``logits`` are its own, to be overwritten; None computes them again."""
        index = self._live_on_host(vectors)
        where = chosen if index is None else index + chosen.start
        vectors = vectors if index is None else vectors.at(index)
        if not len(vectors.targets):
            return
        if logits is None:
            logits = self.logits(where)
        elif index is not None:
            logits = _to_front(logits, index)
        y, logp, entropy, lse, c, e = vectors
        dz = logits if self.rounded is None else self.rounded[: len(logits)]
        out = dz if self.d_bias is None else logits  # the bias adds up what is not rounded
        self.rows.backward(logits, y, (logp, entropy, lse), c, e, out, self.options.logits)
        if self.d_bias is not None:
            self.d_bias += out.sum(0, dtype=self.d_bias.dtype)
        if out is not dz:
            dz.copy_(out)
        if self.rows.products is not None and self._counts_on_device:
            self._add_live(chosen, dz, self.rows.products, self.rows.products.find(c, e))
        else:
            self._add(where, dz)

    def _live_on_host(self, vectors: RowVectors) -> Tensor | None:
        """The rows with a gradient, where the host knows them without waiting. None: take all."""
        kept = [v for v in (vectors.grad_logp, vectors.grad_entropy) if v is not None]
        if not kept or self.options.compact_rows is False or self._counts_on_device or kept[0].device.type != "cpu":
            return None
        live = torch.stack([v != 0 for v in kept]).any(0) & (vectors.targets != IGNORED)
        return None if live.all() else live.nonzero().squeeze(1)

    def _add(self, where: slice | Tensor, dz: Tensor) -> None:
        if self.d_hidden is not None and isinstance(where, slice):
            product(dz, self.weight, self.d_hidden[where])
        elif self.d_hidden is not None:
            compact = torch.empty_like(self.d_hidden[: len(dz)])
            product(dz, self.weight, compact)
            self.d_hidden[where] = compact
        if self.d_weight is not None:
            product(dz.t(), self.hidden[where], self.d_weight, beta=float(self.started))
            self.started = True

    def _add_live(self, chosen: slice, dz: Tensor, products: RowProducts, live: LiveRows) -> None:
        if self.d_hidden is not None:
            products.d_hidden(dz, self.weight, live, self.d_hidden[chosen])
        if self.d_weight is not None:
            products.d_weight(dz, self.hidden[chosen], live, self.d_weight, self.started)
            self.started = True

    def gradients(self) -> Sequence[Tensor | None]:
        """(dX, dW, db), each None unless wanted."""
        if self.d_weight is not None and not self.started:
            self.d_weight.zero_()
        return self.d_hidden, self.d_weight, self.d_bias


def _aligned(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, V] with each row at a multiple of 16 entries: where V is none, kernels and GEMMs would read entry by entry."""
    vocab = len(weight)
    return weight.new_empty(rows, -(-vocab // 16) * 16, dtype=dtype)[:, :vocab]


def _to_front(logits: Tensor, index: Tensor) -> Tensor:
    """The rows at ``index``, moved to the front in place."""
    for new, old in enumerate(index.tolist()):
        logits[new].copy_(logits[old])  # old >= new: no row is overwritten before it is read
    return logits[: len(index)]
