"""The language-model head in chunks: log-probabilities at 4 GEMM units, a row-local loss with its gradients at 3.

A unit is one GEMM of 2*A*D*V FLOP. PPO's loss is row local: once a row's log-probability and entropy are known, so are
c = dL/dlogp and e = dL/dentropy, by ordinary autograd on [C]-vectors. So each chunk of C rows does, in ONE reused buffer,

    logits = hidden[C] @ W^T            one GEMM
    logp, entropy, lse                  one read (row kernel)
    c, e = grad(loss_fn)(logp, entropy) any torch function
    dz over the logits                  one pass in place (row kernel)
    dX[C] = dz @ W;  dW += dz^T @ X     two GEMMs, dW summed in fp32

and nothing is computed again in backward. ``linear_logprobs`` runs the same GEMM and row kernel on the same chunks,
so that the first ratio of PPO is exactly 1. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import LogitOptions, Rows, compute_dtype, define
from .reference import TokenLoss, chunk_rows


def _product(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> None:
    """out = a @ b + beta * out, summed in fp32 (fp64) whatever the operands; ``beta`` 0 ignores what ``out`` holds."""
    if out.is_cuda and b.dtype != out.dtype and out.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(out, a.to(b.dtype), b, out.dtype, beta=beta, out=out)
    elif a.dtype == b.dtype == out.dtype or out.is_cuda:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
    else:
        wide = compute_dtype(out.dtype)
        result = out.new_empty(out.shape, dtype=wide)
        torch.mm(a.to(wide), b.to(wide), out=result)  # with out=, autocast leaves the precision alone
        out.copy_(result if beta == 0.0 else result.add_(out, alpha=beta))


class _Head:
    """One call's chunks of logits, in one reused buffer, and its gradients."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int | None, dtype: torch.dtype | None
    ):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        dtype = dtype or hidden.dtype
        self.size = chunk_rows(chunk_size, len(weight), dtype, hidden.device)
        self.buffer = weight.new_empty(min(self.size, len(hidden)), len(weight), dtype=dtype)
        self.grads: list[Tensor | None] = [None, None, None]
        self.started = False

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Allocate the gradients: dX in hidden's dtype (each row is written once), dW and db in fp32 (fp64)."""
        wide = compute_dtype(self.weight.dtype)
        if hidden:
            self.grads[0] = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        if weight:
            self.grads[1] = self.weight.new_empty(self.weight.shape, dtype=wide)
        if bias:
            self.grads[2] = self.weight.new_zeros(len(self.weight), dtype=wide)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, max(len(self.hidden), 1), self.size):
            yield slice(start, start + self.size)

    def logits(self, hidden: Tensor) -> Tensor:
        out = self.buffer[: len(hidden)]
        _product(hidden, self.weight.t(), out)
        return out if self.bias is None else out.add_(self.bias)

    def add_gradients(self, chosen: slice | Tensor, dz: Tensor) -> None:
        d_hidden, d_weight, d_bias = self.grads
        if d_hidden is not None and isinstance(chosen, slice):
            _product(dz, self.weight, d_hidden[chosen])
        elif d_hidden is not None:
            compact = torch.empty_like(d_hidden[: len(dz)])
            _product(dz, self.weight, compact)
            d_hidden[chosen] = compact
        if d_weight is not None:
            _product(dz.t(), self.hidden[chosen], d_weight, beta=float(self.started))
            self.started = True
        if d_bias is not None:
            d_bias += dz.sum(0, dtype=d_bias.dtype)

    def gradients(self) -> list[Tensor | None]:
        if self.grads[1] is not None and not self.started:
            self.grads[1].zero_()
        return self.grads


def _live_rows(chosen: slice, vectors: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of the chunk with a gradient, where knowing them costs nothing: on a CPU. None when that is all of them.

    On an accelerator the count would have to reach the host; there the row kernel writes zeros without reading the
    logits.
    """
    kept = [v[chosen] for v in vectors if v is not None]
    if not kept or kept[0].device.type != "cpu":
        return None
    live = torch.stack([v != 0 for v in kept]).any(0)
    return None if live.all() else live.nonzero().squeeze(1)


def _pick(index: Tensor | None, vectors: Sequence[Tensor | None]) -> list[Any]:
    return [v if v is None or index is None else v[index] for v in vectors]


def _sweep(
    head: _Head,
    rows: Rows,
    targets: Tensor,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    options: LogitOptions,
) -> list[Tensor | None]:
    """Backward of ``linear_logprobs``: each chunk's logits again, its gradient over them, dX and dW."""
    for chosen in head.chunks():
        index = _live_rows(chosen, grads)
        where = chosen if index is None else index + chosen.start
        y, logp, entropy, lse, c, e = _pick(
            index, [None if v is None else v[chosen] for v in (targets, *saved, *grads)]
        )
        if len(y):
            logits = head.logits(head.hidden[where])
            rows.backward(logits, y, (logp, entropy, lse), c, e, logits, options)
            head.add_gradients(where, logits)
    return head.gradients()


def linear_logprobs_op(backend: str, rows: Rows) -> Callable[..., tuple[Tensor, Tensor]]:
    """``linear_logprobs`` as the custom ops ``<backend>_linear_logprobs`` and ``.._backward``."""
    inputs = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
    numbers = "float temperature, float softcap, float logit_scale, int? chunk_size, ScalarType? logits_dtype"

    def forward(hidden, weight, bias, targets, temperature, softcap, logit_scale, chunk_size, logits_dtype):
        head, options = (
            _Head(hidden, weight, bias, chunk_size, logits_dtype),
            LogitOptions(temperature, softcap, logit_scale),
        )
        parts = [rows.forward(head.logits(hidden[c]), targets[c], options) for c in head.chunks()]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def forward_fake(hidden, *_):
        return tuple(hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype)) for _ in range(3))

    def backward(hidden, weight, bias, targets, logp, entropy, lse, c, e, need, *numbers):
        head = _Head(hidden, weight, bias, *numbers[3:])
        head.want(*need)
        grads = _sweep(head, rows, targets, (logp, entropy, lse), (c, e), LogitOptions(*numbers[:3]))
        like = (hidden, weight, weight)
        return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(grads, like, strict=True))

    def backward_fake(hidden, weight, *rest):
        need = rest[7]
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        return tuple(x.new_empty(s if n else 0) for x, s, n in zip((hidden, weight, weight), shapes, need, strict=True))

    op = define(
        f"{backend}_linear_logprobs", f"({inputs}, {numbers}) -> (Tensor, Tensor, Tensor)", forward, forward_fake
    )
    saved = "Tensor logp, Tensor entropy, Tensor lse, Tensor? grad_logp, Tensor? grad_entropy, bool[] need"
    backward_op = define(
        f"{backend}_linear_logprobs_backward",
        f"({inputs}, {saved}, {numbers}) -> (Tensor, Tensor, Tensor)",
        backward,
        backward_fake,
    )

    def setup(ctx, inputs, output):
        hidden, weight, bias, targets, *ctx.numbers = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(hidden, weight, bias, targets, *output)

    def gradient(ctx, grad_logp, grad_entropy, _):
        need = list(ctx.needs_input_grad[:3])
        grads = backward_op(*ctx.saved_tensors, grad_logp, grad_entropy, need, *ctx.numbers)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 6

    op.register_autograd(gradient, setup_context=setup)

    def linear_logprobs(
        hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
        softcap: float | None = None, logit_scale: float = 1.0, chunk_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = op(hidden, weight, bias, targets, temperature, softcap or 0.0, logit_scale, chunk_size, logits_dtype)
        return out[0], out[1]

    return linear_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What a call of ``linear_token_loss`` carries beside its differentiable tensors."""

    kernels: Rows
    targets: Tensor
    loss_fn: TokenLoss
    options: LogitOptions
    chunk_size: int | None
    logits_dtype: torch.dtype | None
    normalizer: float | Tensor
    stats: dict[str, Tensor]
    """Filled by forward."""


def _chunk_loss(
    call: _Call, logp: Tensor, entropy: Tensor, rows: Sequence[Tensor], learned: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """(the chunk's loss, its gradients with respect to logp, entropy and the learned rows), all normalised."""
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_(need)
            for x, need in zip((logp, entropy, *rows), (True, True, *learned), strict=True)
        ]
        loss, metrics = call.loss_fn(*leaves)
        if loss.dim() != 0:
            raise ValueError(f"loss_fn returned a loss of shape {tuple(loss.shape)}: return the sum over its rows")
        wanted = [x for x in leaves if x.requires_grad]
        scale = torch.ones_like(loss) / call.normalizer
        found = (
            torch.autograd.grad(loss, wanted, scale, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
        )
    for name, value in metrics.items():
        call.stats[name] = call.stats[name] + value.detach() if name in call.stats else value.detach()
    return loss.detach() * scale, list(found)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call, *rows):
        need, learned = ctx.needs_input_grad[:3], ctx.needs_input_grad[4:]
        head = _Head(hidden, weight, bias, call.chunk_size, call.logits_dtype)
        head.want(*need)
        row_grads = [torch.zeros_like(row) for row, wanted in zip(rows, learned, strict=True) if wanted]
        total = hidden.new_zeros((), dtype=compute_dtype(hidden.dtype))
        for chosen in head.chunks():
            total = total + _forward_chunk(call, head, chosen, rows, learned, row_grads, any(need))
        ctx.grads = [
            g if g is None else (g, x.dtype) for g, x in zip(head.gradients(), (hidden, weight, bias), strict=True)
        ]
        found = iter(row_grads)
        ctx.grads += [
            None,
            *((next(found), row.dtype) if wanted else None for row, wanted in zip(rows, learned, strict=True)),
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss: a second backward, and its gradients are spent: call the op again")
        grads, ctx.grads = ctx.grads, None
        return tuple(None if g is None else _scaled(g[0], g[1], grad_outputs[0]) for g in grads)


def _forward_chunk(
    call: _Call,
    head: _Head,
    chosen: slice,
    rows: Sequence[Tensor],
    learned: Sequence[bool],
    row_grads: list[Tensor],
    need: bool,
) -> Tensor:
    logits, y = head.logits(head.hidden[chosen]), call.targets[chosen]
    saved = call.kernels.forward(logits, y, call.options)
    loss, (c, e, *others) = _chunk_loss(call, saved[0], saved[1], [row[chosen] for row in rows], learned)
    for total, part in zip(row_grads, others, strict=True):
        if part is not None:
            total[chosen] = part
    if need and (c is not None or e is not None):
        index = _live_rows(slice(None), (c, e))
        for new, old in enumerate([] if index is None else index.tolist()):
            logits[new].copy_(logits[old])  # old >= new: the live rows move to the front, in place
        y, logp, entropy, lse, c, e = _pick(index, (y, *saved, c, e))
        dz = logits[: len(y)]
        if len(y):
            call.kernels.backward(dz, y, (logp, entropy, lse), c, e, dz, call.options)
            head.add_gradients(chosen if index is None else index + chosen.start, dz)
    return loss


def _scaled(stored: Tensor, dtype: torch.dtype, grad: Tensor) -> Tensor:
    """The stored gradient times the upstream one, without a device sync, and without a copy where the dtype allows."""
    if stored.dtype == dtype:
        return stored if grad.device.type == "cpu" and grad == 1 else stored.mul_(grad.to(dtype))
    return torch.mul(stored, grad, out=stored.new_empty(stored.shape, dtype=dtype))


def linear_token_loss_op(
    rows_of: Rows, linear_logprobs: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """``linear_token_loss`` on a backend's row kernels."""

    def linear_token_loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: TokenLoss, rows: Sequence[Tensor] = (), *,
        bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
        chunk_size: int | None = None, logits_dtype: torch.dtype | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        divisor = max(targets.shape[0], 1) if normalizer is None else normalizer
        if torch.compiler.is_compiling():  # the loss traces with the rest of the graph, at 4 units
            logp, entropy = linear_logprobs(
                hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                chunk_size=chunk_size, logits_dtype=logits_dtype,
            )  # fmt: skip
            loss, metrics = loss_fn(logp, entropy, *rows)
            return loss / divisor, {name: value.detach() for name, value in metrics.items()}
        call = _Call(
            kernels=rows_of, targets=targets, loss_fn=loss_fn, normalizer=divisor, chunk_size=chunk_size,
            logits_dtype=logits_dtype, options=LogitOptions(temperature, softcap or 0.0, logit_scale), stats={},
        )  # fmt: skip
        return _LinearTokenLoss.apply(hidden, weight, bias, call, *rows), call.stats

    return linear_token_loss
