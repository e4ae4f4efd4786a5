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
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tppo_fast.data_types import to_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Part(NamedTuple):
    """One varlen call: sequences of queries, each looking at one sequence of keys."""

    queries: Int[Tensor, "Q"] | slice
    """Which tokens ask, sequence after sequence."""
    keys: Int[Tensor, "K"] | slice
    """Which tokens are looked at, likewise."""
    cu_queries: Int[Tensor, "P+1"]
    """Where each sequence of queries starts, int32."""
    cu_keys: Int[Tensor, "P+1"]
    """Where each sequence of keys starts, int32."""
    max_queries: int
    """The longest sequence of queries."""
    max_keys: int
    """The longest sequence of keys."""
    causal: bool
    """Query i of a sequence looks at keys 0 to i alone."""


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
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *_bounds(part), 0.0, part.causal and window is None,
            no_dropout, torch.empty(0, device=q.device), scale=scale, **_window(part, window),
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


def _bounds(part: Part) -> tuple[Tensor, Tensor, int, int]:
    return part.cu_queries, part.cu_keys, part.max_queries, part.max_keys


def _window(part: Part, window: int | None) -> dict[str, int]:
    left = -1 if window is None else window - 1
    return {"window_size_left": left, "window_size_right": 0 if part.causal else -1}


@cache
def best_kernel() -> Kernel:
    """flash-attn's where the package is installed (a broken one raises its ImportError), else torch's own."""
    return TorchFlash() if importlib.util.find_spec("flash_attn") is None else FlashAttn()


def parts(cu_seqlens: Sequence[int], prefix: Sequence[int], device: torch.device) -> list[Part]:
    """The calls that make up a packed batch's attention: each segment on itself, and where there are shared prompts, the
    responses on them.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    bounds = to_device(torch.tensor(cu_seqlens, dtype=torch.int32), device)
    longest = max(lengths, default=0)
    found = [Part(slice(None), slice(None), bounds, bounds, longest, longest, True)]
    families: dict[int, list[int]] = {}
    for segment, parent in enumerate(prefix):
        if parent >= 0:
            families.setdefault(parent, []).append(segment)
    if families:
        (queries, cu_queries), (keys, cu_keys) = (
            _joined([[range(*cu_seqlens[s : s + 2]) for s in group] for group in groups], device)
            for groups in (families.values(), [[p] for p in families])
        )
        longest_q, longest_k = (
            max(sum(lengths[s] for s in family) for family in families.values()),
            max(lengths[p] for p in families),
        )
        found.append(Part(queries, keys, cu_queries, cu_keys, longest_q, longest_k, False))
    return found


def _joined(sequences: Sequence[Sequence[range]], device: torch.device) -> tuple[Tensor | slice, Tensor]:
    """(the tokens of all ranges end to end, where each sequence of them starts int32)."""
    ranges = [r for sequence in sequences for r in sequence]
    bounds = torch.tensor([0, *(sum(map(len, sequence)) for sequence in sequences)]).cumsum(0).to(torch.int32)
    if all(a.stop == b.start for a, b in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop), to_device(bounds, device)
    index = torch.cat([torch.arange(r.start, r.stop) for r in ranges])
    return to_device(index, device), to_device(bounds, device)


def attend(
    q: Float[Tensor, "N H d"],
    k: Float[Tensor, "N Hkv d"],
    v: Float[Tensor, "N Hkv d"],
    parts: Sequence[Part],
    *,
    scale: float | None = None,
    window: int | None = None,
    kernel: Kernel | None = None,
) -> Float[Tensor, "N H d"]:
    """Attention over all parts at once, differentiable.

    Args:
        q, k, v: of every token, in the kernel's dtype.
        parts: the first one holds every token; see ``parts``.
        scale: of the scores; None is 1 / sqrt(d).
        window: keys that a query looks at, itself included; with a second part it must not cut anything off.
        kernel: what computes a part; None is ``best_kernel()``.
    """
    return _Attend.apply(q, k, v, parts, scale, window, kernel or best_kernel())  # type: ignore[return-value]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: Any, scale: Any, window: Any, kernel: Any) -> Tensor:
        out, lse = kernel.forward(q, k, v, parts[0], scale, window)
        for part in parts[1:]:
            more, more_lse = kernel.forward(q[part.queries], k[part.keys], v[part.keys], part, scale, None)
            before = lse[:, part.queries]
            both = torch.logaddexp(before, more_lse)
            merged = _share(out[part.queries], before - both) + _share(more, more_lse - both)
            out[part.queries], lse[:, part.queries] = merged.to(out.dtype), both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = parts, scale, window, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        parts, scale, window, kernel = ctx.rest
        grad = grads[0].contiguous()
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, parts[0], scale, window)
        for part in parts[1:]:
            asking, looked_at = part.queries, part.keys  # each token at most once in either
            more = kernel.backward(
                grad[asking], q[asking], k[looked_at], v[looked_at], out[asking], lse[:, asking].contiguous(),
                part, scale, None,
            )  # fmt: skip
            for total, index, extra in zip((dq, dk, dv), (asking, looked_at, looked_at), more, strict=True):
                if isinstance(index, slice):
                    total[index].add_(extra)
                else:
                    total[index] += extra
        return dq, dk, dv, None, None, None, None


def _share(out: Tensor, log_weight: Tensor) -> Tensor:
    """[Q, H, d], weighted by exp of [H, Q], in the wider dtype of the two (the log-sum-exp's fp32)."""
    return out * log_weight.exp().T[..., None]
