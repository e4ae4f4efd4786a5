"""Packed attention by kernels for sequences of any length; a shared prompt is read once by all of its responses.

A token of a response attends to its own segment and to all of the prompt's. No varlen kernel has that mask, but two calls
have it together: every segment causally on itself, and all responses of a prompt, end to end, on the whole prompt. Softmax
over both sets of keys is their outputs weighted by the exponents of their log-sum-exps (as FlashAttention merges blocks,
arXiv 2205.14135, section 3.1). Backward is exact without a derivative of the log-sum-exp: given the MERGED output and
log-sum-exp, a flash kernel's backward rebuilds each part's weights as exp(score - log-sum-exp) of the whole softmax.

The kernels are those of the flash-attn package where it is installed, else torch's own (FlashAttention 2, or the version
chosen by ``torch.nn.attention.activate_flash_attention_impl``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, library

from tppo_fast.data_types import to_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Part(NamedTuple):
    """One varlen call: sequences of queries, each looking at one sequence of keys."""

    queries: slice
    """Which tokens ask, sequence after sequence."""
    keys: slice
    """Which tokens are looked at, likewise."""
    cu_queries: Int[Tensor, "P+1"]
    """Where each sequence of queries starts within ``queries``, int32."""
    cu_keys: Int[Tensor, "P+1"]
    """Where each sequence of keys starts within ``keys``, int32."""
    max_queries: int
    """The longest sequence of queries."""
    max_keys: int
    """The longest sequence of keys."""
    causal: bool
    """Query i of a sequence looks at keys 0 to i alone."""


class Calls(NamedTuple):
    """The calls of one packed batch as two tensors, which a compiled graph takes without looking into them."""

    bounds: Int[Tensor, "K"]
    """int32, on the device: each call's starts of queries, then of keys."""
    numbers: Int[Tensor, "C 7"]
    """int64, on the CPU: each call's sequences, first and last token of its queries and of its keys, longest of both."""

    def parts(self) -> Iterator[Part]:
        """Each call; the first one is that of every segment on itself."""
        start = 0
        for call, (count, first, last, first_key, last_key, longest, longest_key) in enumerate(self.numbers.tolist()):
            cu_queries, cu_keys = self.bounds[start : start + 2 * count + 2].chunk(2)
            start += 2 * count + 2
            queries, keys = slice(first, last), slice(first_key, last_key)
            yield Part(queries, keys, cu_queries, cu_keys, longest, longest_key, call == 0)


class Kernel(Protocol):
    """A varlen attention kernel and its backward. ``window``: how many keys a causal query looks at, itself included."""

    def forward(
        self, q: Float[Tensor, "Q H d"], k: Float[Tensor, "K Hkv d"], v: Float[Tensor, "K Hkv d"],
        part: Part, scale: float | None, window: int | None,
    ) -> tuple[Float[Tensor, "Q H d"], Float[Tensor, "H Q"]]:  # fmt: skip
        """(outputs, log-sum-exps in fp32)."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        part: Part, scale: float | None, window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, for weights exp(scale q k - lse) and row terms grad . out."""
        ...


class TorchFlash:
    """torch's CUDA kernels, in half precision."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel``."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_bounds(part), 0.0, part.causal and window is None,
            return_debug_mask=False, scale=scale, **_window(part, window),
        )  # fmt: skip
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        part: Part, scale: float | None, window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See ``Kernel``."""
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *_bounds(part), 0.0, part.causal and window is None,
            *_no_dropout(q.device), scale=scale, **_window(part, window),
        )  # fmt: skip


class FlashAttn:
    """The kernels of the flash-attn package (2.7 or newer), in half precision."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        self._forward = flash_attn_interface._flash_attn_varlen_forward
        self._backward = flash_attn_interface._flash_attn_varlen_backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel``."""
        out, lse, *_ = self._forward(q, k, v, **self._options(q, part, scale, window))
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        part: Part, scale: float | None, window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See ``Kernel``."""
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        options = self._options(q, part, scale, window)
        self._backward(grad, q, k, v, out, lse, dq, dk, dv, **options, deterministic=False)
        return dq, dk, dv

    def _options(self, q: Tensor, part: Part, scale: float | None, window: int | None) -> dict[str, Any]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return {
            **dict(zip(names, _bounds(part), strict=True)),
            "dropout_p": 0.0,
            "softmax_scale": q.shape[-1] ** -0.5 if scale is None else scale,
            "causal": part.causal,
            **_window(part, window),
            "softcap": 0.0,
            "alibi_slopes": None,
        }


@cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a generator that is never asked; made once, since every layer's backward wants it."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def _bounds(part: Part) -> tuple[Tensor, Tensor, int, int]:
    return part.cu_queries, part.cu_keys, part.max_queries, part.max_keys


def _window(part: Part, window: int | None) -> dict[str, int]:
    left = -1 if window is None else window - 1
    return {"window_size_left": left, "window_size_right": 0 if part.causal else -1}


@cache
def best_kernel() -> Kernel:
    """flash-attn's where the package is installed (a broken one raises its ImportError), else torch's own."""
    return FlashAttn() if has_flash_attn() else TorchFlash()


def has_flash_attn() -> bool:
    """Whether flash-attn 2 or 3 is installed; of version 4 there is but a folder of that name, without a module."""
    spec = importlib.util.find_spec("flash_attn")
    return spec is not None and spec.origin is not None


def calls(cu_seqlens: Sequence[int], prefix: Sequence[int], device: torch.device) -> Calls:
    """The calls that make up a packed batch's attention: each segment on itself, and responses on the prompts they share.

    One call holds all shared prompts where these, and their responses in the same order, lie end to end, as
    ``packing.select`` puts them; otherwise there are more.
    """
    spans = list(pairwise(cu_seqlens))
    found = [_Call([(a, b, a, b) for a, b in spans])]
    own: tuple[int, int, int, int] | None = (
        None  # (first, last) token of one prompt's responses so far, and of the prompt
    )
    for (first, last), parent in zip(spans, prefix, strict=True):
        if parent < 0:
            continue
        prompt = spans[parent]
        if own is not None and own[2:] == prompt and own[1] == first:
            own = (own[0], last, *prompt)
            found[-1].rows[-1] = own
            continue
        follows = own is not None and own[1] == first and own[3] == prompt[0]
        own = (first, last, *prompt)
        if follows:
            found[-1].rows.append(own)
        else:
            found.append(_Call([own]))
    bounds = torch.tensor([n for call in found for n in call.bounds()], dtype=torch.int32)
    return Calls(to_device(bounds, device), torch.tensor([call.numbers() for call in found]))


class _Call(NamedTuple):
    rows: list[tuple[int, int, int, int]]
    """Of each sequence: first and last token of its queries, first and last of its keys."""

    def bounds(self) -> list[int]:
        first, first_key = self.rows[0][0], self.rows[0][2]
        return [0, *(row[1] - first for row in self.rows), 0, *(row[3] - first_key for row in self.rows)]

    def numbers(self) -> list[int]:
        longest = max(b - a for a, b, _, _ in self.rows), max(b - a for _, _, a, b in self.rows)
        return [len(self.rows), self.rows[0][0], self.rows[-1][1], self.rows[0][2], self.rows[-1][3], *longest]


def attend(
    q: Float[Tensor, "N H d"],
    k: Float[Tensor, "N Hkv d"],
    v: Float[Tensor, "N Hkv d"],
    calls: Calls,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "N H d"]:
    """Attention over all calls at once by ``best_kernel``, differentiable; one opaque op under torch.compile.

    Args:
        q, k, v: of every token, in the kernel's dtype.
        calls: see ``calls``.
        scale: of the scores; None is 1 / sqrt(d).
        window: keys that a query looks at, itself included; with a second call it must not cut anything off.
    """
    return _forward_op(q, k, v, *calls, scale, window)[0]


_OPTIONS = "Tensor bounds, Tensor numbers, float? scale, int? window"


@library.custom_op(
    "tppo_fast::varlen_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward_op(q, k, v, bounds, numbers, scale, window):
    kernel = best_kernel()
    own, *rest = Calls(bounds, numbers).parts()
    out, lse = (x.contiguous() for x in kernel.forward(q, k, v, own, scale, window))
    for part in rest:
        more, more_lse = kernel.forward(q[part.queries], k[part.keys], v[part.keys], part, scale, None)
        before, so_far = lse[:, part.queries], out[part.queries]
        share = torch.sigmoid(more_lse - before).T[..., None]  # exp(more_lse) / (exp(before) + exp(more_lse))
        so_far.copy_(torch.lerp(so_far.to(share.dtype), more.to(share.dtype), share))
        torch.logaddexp(before, more_lse, out=before)
    return out, lse


@_forward_op.register_fake
def _(q, k, v, bounds, numbers, scale, window):
    del k, v, bounds, numbers, scale, window
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


@library.custom_op(
    "tppo_fast::varlen_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(grad, q, k, v, out, lse, bounds, numbers, scale, window):
    kernel, grad = best_kernel(), grad.contiguous()
    own, *rest = Calls(bounds, numbers).parts()
    totals = tuple(x.contiguous() for x in kernel.backward(grad, q, k, v, out, lse, own, scale, window))
    for part in rest:
        asking, looked_at = part.queries, part.keys
        more = kernel.backward(
            grad[asking], q[asking], k[looked_at], v[looked_at], out[asking], lse[:, asking].contiguous(),
            part, scale, None,
        )  # fmt: skip
        for total, index, extra in zip(totals, (asking, looked_at, looked_at), more, strict=True):
            total[index].add_(extra)
    return totals


@_backward_op.register_fake
def _(grad, q, k, v, *others):
    del grad, others
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, numbers, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nor is a gradient of zeros made for it
    ctx.save_for_backward(q, k, v, *output, bounds, numbers)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_forward_op.register_autograd(_gradient, setup_context=_save)
