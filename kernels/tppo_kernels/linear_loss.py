"""The language-model head in chunks: log-probabilities at 4 GEMM units, a row-local loss with its gradients at 3.

A unit is one GEMM of 2*A*D*V FLOP. PPO's loss is row local: once a row's log-probability and entropy are known, so are
c = dL/dlogp and e = dL/dentropy, by ordinary autograd on [C]-vectors. So each chunk of C rows does, in ONE reused buffer,

    logits = hidden[C] @ W^T            one GEMM
    logp, entropy, lse                  one read (row kernel)
    c, e = grad(loss_fn)(logp, entropy) any torch function
    dz over the logits                  one pass in place (row kernel)
    dX[C] = dz @ W;  dW += dz^T @ X     two GEMMs, dW summed in fp32

and nothing is computed again in backward. ``linear_logprobs`` runs the same GEMM and row kernel on the same chunks,
so that the first ratio of PPO is exactly 1. No atomics: the same inputs give the same bits. The chunks themselves, and
which rows the last two GEMMs leave out, are in ``head``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .checks import TokenLoss, call_loss, count_of, rows_at
from .custom_ops import Rows, compute_dtype, define, refuse_gradients, refuse_second_derivative
from .head import Head, HeadOptions, RowVectors
from .reference import IGNORED


def linear_logprobs_op(backend: str, rows: Rows) -> Callable[..., tuple[Tensor, Tensor]]:
    """``linear_logprobs`` as the custom ops ``<backend>_linear_logprobs`` and ``.._backward``."""
    inputs = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
    saved = "Tensor logp, Tensor entropy, Tensor lse, Tensor? grad_logp, Tensor? grad_entropy, bool[] need"
    options = (
        "float temperature, float softcap, float logit_scale, int? chunk_size, ScalarType? logits_dtype,"
        " bool? compact_rows"
    )

    def forward(hidden, weight, bias, targets, *numbers):
        head = Head(rows, hidden, weight, bias, HeadOptions(*numbers))
        parts = [rows.forward(head.logits(c), targets[c], head.options.logits) for c in head.chunks()]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def forward_fake(hidden, *others):
        dtype = compute_dtype(HeadOptions(*others[3:]).logits_dtype or hidden.dtype)
        return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))

    def backward(hidden, weight, bias, targets, logp, entropy, lse, grad_logp, grad_entropy, need, *numbers):
        head = Head(rows, hidden, weight, bias, HeadOptions(*numbers))
        head.want(*need)
        vectors = RowVectors(targets, logp, entropy, lse, grad_logp, grad_entropy)
        for chosen in head.chunks():
            head.add_gradients(chosen, vectors.at(chosen))
        like = (hidden, weight, weight if bias is None else bias)
        return tuple(
            x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(head.gradients(), like, strict=True)
        )

    def backward_fake(hidden, weight, bias, *rest):
        like, need = (hidden, weight, weight if bias is None else bias), rest[6]
        return tuple(x.new_empty(x.shape if n else 0) for x, n in zip(like, need, strict=True))

    name = f"{backend}_linear_logprobs"
    op = define(name, f"({inputs}, {options}) -> (Tensor, Tensor, Tensor)", forward, forward_fake)
    backward_op = define(
        f"{name}_backward", f"({inputs}, {saved}, {options}) -> (Tensor, Tensor, Tensor)", backward, backward_fake
    )

    def setup(ctx, inputs, output):
        hidden, weight, bias, targets, *ctx.numbers = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(hidden, weight, bias, targets, *output)

    def gradient(ctx, grad_logp, grad_entropy, _):
        need = list(ctx.needs_input_grad[:3])
        grads = backward_op(*ctx.saved_tensors, grad_logp, grad_entropy, need, *ctx.numbers)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), None, *(None for _ in ctx.numbers)

    op.register_autograd(gradient, setup_context=setup)

    def linear_logprobs(
        hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
        softcap: float | None = None, logit_scale: float = 1.0, chunk_size: int | None = None,
        logits_dtype: torch.dtype | None = None, compact_rows: bool | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        numbers = HeadOptions(temperature, softcap or 0.0, logit_scale, chunk_size, logits_dtype, compact_rows)
        logp, entropy, _ = op(hidden, weight, bias, targets, *numbers)
        return logp, entropy

    return linear_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What a call of ``linear_token_loss`` carries beside its differentiable tensors."""

    kernels: Rows
    targets: Tensor
    loss_fn: TokenLoss
    options: HeadOptions
    normalizer: float | Tensor
    differentiable: bool
    """Whether gradients are recorded around the call."""
    stats: dict[str, Tensor]
    """Filled by forward."""


def _refuse_captured(loss: Tensor, leaves: Sequence[Tensor | None]) -> None:
    """Raise for a tensor that requires a gradient and reached the loss by another way than its arguments.

    Gradients are asked for with respect to the arguments alone: it would get none, in silence.
    """
    own, seen = {id(x) for x in leaves}, set()
    nodes = [torch.autograd.graph.get_gradient_edge(loss).node] if loss.requires_grad else []
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions if n is not None]
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None and id(variable) not in own:
            raise ValueError(
                f"loss_fn uses a tensor that requires a gradient (one of shape {tuple(variable.shape)}) and is not among its"
                " arguments, which would get none: pass what is computed from it in rows (a scalar as x.expand(A)), detach"
                " it, or use backend='reference'"
            )


def _chunk_loss(
    call: _Call, chosen: slice, logp: Tensor, entropy: Tensor, rows: Sequence[Tensor | None], learned: Sequence[bool], need: bool
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """(the chunk's loss, its gradients with respect to logp, entropy (None without ``need``) and the rows), normalised."""
    needs, columns = (need, need, *learned), (logp, entropy, *rows_at(rows, chosen))
    # What the loss saves is needed at once: the caller's hooks (a checkpoint's, which would run its body again for each
    # chunk, or an offload's) are for what waits until backward.
    saved_as_is = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.set_grad_enabled(call.differentiable), saved_as_is:
        leaves = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(columns, needs, strict=True)]
        loss, metrics = call_loss(call.loss_fn, *leaves)
        if call.differentiable:
            _refuse_captured(loss, leaves)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        scale = torch.ones_like(loss) / call.normalizer
        found = iter(
            torch.autograd.grad(loss, wanted, scale, allow_unused=True)
            if wanted and loss.requires_grad
            else [None] * len(wanted)
        )
    for name, value in metrics.items():
        call.stats[name] = call.stats[name] + value if name in call.stats else value
    return loss.detach() * scale, [next(found) if n else None for n in needs]


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call, *rows):
        need, learned = ctx.needs_input_grad[:3], ctx.needs_input_grad[4:]
        head = Head(call.kernels, hidden, weight, bias, call.options)
        head.want(*need)
        row_grads = [torch.zeros_like(row) for row in itertools.compress(rows, learned)]
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
    def backward(ctx, *grad_outputs):
        refuse_second_derivative("linear_token_loss")
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss: a second backward, and its gradients are spent: call the op again")
        grads, ctx.grads = ctx.grads, None
        return tuple(None if g is None else _scaled(g[0], g[1], grad_outputs[0]) for g in grads)


def _forward_chunk(
    call: _Call, head: Head, chosen: slice, rows: Sequence[Tensor | None], learned: Sequence[bool], row_grads: list[Tensor],
    need: bool,
) -> Tensor:  # fmt: skip
    """The chunk's share of the loss; its gradients are added to the head's and to ``row_grads``."""
    logits, y = head.logits(chosen), call.targets[chosen]
    saved = call.kernels.forward(logits, y, call.options.logits)
    loss, (c, e, *others) = _chunk_loss(call, chosen, saved[0], saved[1], rows, learned, need)
    for total, part in zip(row_grads, itertools.compress(others, learned), strict=True):
        if part is not None:
            total[chosen] = part
    if need and (c is not None or e is not None):
        head.add_gradients(chosen, RowVectors(y, *saved, c, e), logits)
    return loss


def _scaled(stored: Tensor, dtype: torch.dtype, grad: Tensor) -> Tensor:
    """The stored gradient times the upstream one in the wider dtype, without a device sync, in place where that is its own."""
    if stored.dtype == dtype and grad.device.type == "cpu" and grad == 1:
        return stored
    wide = compute_dtype(stored.dtype)
    if stored.dtype == dtype == wide:
        return stored.mul_(grad.to(wide))
    return torch.mul(stored.to(wide), grad.to(wide), out=stored.new_empty(stored.shape, dtype=dtype))


def _is_traced(x: Tensor) -> bool:
    """Whether operations are recorded, or have shapes and no values: what runs beside torch's dispatcher would be lost."""
    return torch.compiler.is_compiling() or x.is_meta or get_proxy_mode() is not None or detect_fake_mode(x) is not None


def linear_token_loss_op(
    rows_of: Rows, linear_logprobs: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """``linear_token_loss`` on a backend's row kernels."""

    def linear_token_loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: TokenLoss, rows: Sequence[Tensor | None] = (), *,
        bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
        chunk_size: int | None = None, logits_dtype: torch.dtype | None = None, compact_rows: bool | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        refuse_gradients(normalizer=normalizer)
        divisor = count_of(targets, targets != IGNORED) if normalizer is None else normalizer
        if _is_traced(hidden):  # the loss traces with the rest of the graph, at 4 units
            logp, entropy = linear_logprobs(
                hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                chunk_size=chunk_size, logits_dtype=logits_dtype, compact_rows=compact_rows,
            )  # fmt: skip
            loss, metrics = call_loss(loss_fn, logp, entropy, *rows)
            return loss / divisor, metrics
        differentiable = torch.is_grad_enabled()
        if not differentiable:  # which an autograd.Function is not told
            hidden, weight = hidden.detach(), weight.detach()
            bias, *rows = (None if x is None else x.detach() for x in (bias, *rows))
        options = HeadOptions(temperature, softcap or 0.0, logit_scale, chunk_size, logits_dtype, compact_rows)
        call = _Call(
            kernels=rows_of, targets=targets, loss_fn=loss_fn, options=options, normalizer=divisor,
            differentiable=differentiable, stats={},
        )  # fmt: skip
        return _LinearTokenLoss.apply(hidden, weight, bias, call, *rows), call.stats

    return linear_token_loss
