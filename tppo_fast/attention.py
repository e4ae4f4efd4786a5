"""Packed attention for any transformers causal LM: each token sees its own segment, causally, and its segment's prefix.

Registered with transformers as ``tppo_packed``. The block structure comes from the batch (``cu_seqlens`` and ``prefix``)
and travels to every layer as the keyword ``layout``. On a GPU in half precision flash kernels for sequences of any length
run (``attention_varlen``). Elsewhere segments of similar length are gathered into a block for torch's SDPA: exact, and
only the attention itself ever sees padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tppo_fast import attention_varlen
from tppo_fast.attention_varlen import Calls, has_flash_attn
from tppo_fast.data_types import to_device
from tppo_fast.errors import UserError

NAME = "tppo_packed"


class Segmented(Protocol):
    """What attention needs to know of a packed batch, such as a ``RolloutBatch``; the fields are explained there."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def prefix(self) -> Tensor: ...


class Segments(NamedTuple):
    """The least that is ``Segmented``."""

    token_ids: Tensor
    cu_seqlens: Tensor
    prefix: Tensor


@dataclass(slots=True)
class _Block:
    """G segments of similar length. Padding repeats a segment's own first token, so that nothing foreign is ever read."""

    queries: Tensor  # [G, Lq] token index
    keys: Tensor  # [G, Lk] token index, the prefix first
    offset: Tensor  # [G] prefix length: query i sits at key position offset + i
    plain: bool  # no prefix anywhere: torch's own causal flag says it all
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """[G, 1, Lq, Lk], True where a query may look; window counts the query's own position."""
        if window not in self.masks:
            q = self.offset[:, None] + torch.arange(self.queries.shape[1], device=self.queries.device)  # [G, Lq]
            k = torch.arange(self.keys.shape[1], device=self.queries.device)
            seen = k <= q[..., None]
            if window is not None:
                seen &= k > q[..., None] - window
            self.masks[window] = seen[:, None]
        return self.masks[window]


@dataclass(slots=True)
class Layout:
    """The attention structure of one packed batch, computed once per forward pass."""

    cu_seqlens: list[int]  # S + 1
    prefix: list[int]  # S
    device: torch.device
    longest: int  # tokens of the longest sequence, its prefix included
    flash: Calls | None  # of the flash kernels; None where SDPA runs
    _blocks: tuple[list[_Block], Tensor] | None = None

    def blocks(self) -> tuple[list[_Block], Tensor]:
        """(SDPA's blocks, the row of each of the N tokens in their concatenated outputs)."""
        if self._blocks is None:
            self._blocks = _build_blocks(self.cu_seqlens, self.prefix, self.device)
        return self._blocks


LARGEST_HEAD = 256
"""Of the flash kernels, in numbers."""


def can_use_flash(device: torch.device, half_precision: bool) -> str | None:
    """Why no flash kernels can run, or None when they can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if not half_precision:
        return 'it needs model.dtype = "bfloat16"'
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"flash kernels need an Ampere GPU or newer, not {torch.cuda.get_device_name(device)}"
    if torch.version.hip is not None and not has_flash_attn():
        return "torch's flash kernels for AMD GPUs give log-sum-exps in another layout, and flash-attn is not installed"
    if not has_flash_attn() and not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash attention, and flash-attn is not installed"
    return None


def build_layout(batch: Segmented, *, flash: bool = False) -> Layout:
    """The layout of a batch, on its device and without waiting for it."""
    device, cu, prefix = batch.token_ids.device, batch.cu_seqlens.tolist(), batch.prefix.tolist()
    lengths = [b - a for a, b in pairwise(cu)]
    longest = max((n + (lengths[p] if p >= 0 else 0) for n, p in zip(lengths, prefix, strict=True)), default=0)
    layout = Layout(cu, prefix, device, longest, attention_varlen.calls(cu, prefix, device) if flash else None)
    if not flash:
        layout.blocks()
    return layout


def _build_blocks(cu: list[int], prefix: list[int], device: torch.device) -> tuple[list[_Block], Tensor]:
    lengths = [b - a for a, b in pairwise(cu)]
    groups: dict[tuple[bool, int], list[int]] = {}
    for s, length in enumerate(lengths):
        groups.setdefault((prefix[s] >= 0, max(length - 1, 1).bit_length()), []).append(s)
    blocks, place, row = [], torch.empty(cu[-1], dtype=torch.int64), 0
    for (has_prefix, _), segments in sorted(groups.items()):
        width = max(lengths[s] for s in segments)
        queries = [_padded(range(cu[s], cu[s + 1]), width) for s in segments]
        keys = queries
        if has_prefix:
            joined = [[*range(cu[prefix[s]], cu[prefix[s] + 1]), *range(cu[s], cu[s + 1])] for s in segments]
            keys = [_padded(j, max(map(len, joined))) for j in joined]
        for g, s in enumerate(segments):
            place[cu[s] : cu[s + 1]] = torch.arange(lengths[s]) + row + g * width
        row += width * len(segments)
        offset = [lengths[prefix[s]] if has_prefix else 0 for s in segments]
        q_index, k_index, off = (to_device(torch.tensor(x, dtype=torch.int64), device) for x in (queries, keys, offset))
        blocks.append(_Block(q_index, k_index, off, not has_prefix))
    return blocks, to_device(place, device)


def _padded(index: range | list[int], width: int) -> list[int]:
    return [*index, *[index[0]] * (width - len(index))]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, N, d], key and value [1, Hkv, N, d] -> [1, N, H, d].

    Raises:
        UserError: the model asks for attention sinks, which no packed path here computes.
    """
    del attention_mask
    if layout is None:
        raise RuntimeError("packed attention was called without the batch's layout")
    if unused.get("s_aux") is not None:
        raise UserError(
            f"model.path: {type(module).__name__} uses attention sinks, which are not supported; use another model"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, d]
    if layout.flash is not None and _flash_fits(layout, layout.flash, q.shape[-1], sliding_window, softcap):
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast rotary embeddings leave them in fp32
        return attention_varlen.attend(q, k, v, layout.flash, scale=scaling, window=sliding_window)[None], None
    return _by_blocks(q, k, v, layout, scaling, sliding_window, softcap)[None], None


def _flash_fits(layout: Layout, calls: Calls, head: int, window: int | None, softcap: float | None) -> bool:
    """Whether a layer's attention is one that the flash kernels have; the others (Gemma 2's, say) run through SDPA."""
    cuts_prefix = window is not None and window < layout.longest and len(calls.numbers) > 1
    return not softcap and head <= LARGEST_HEAD and head % 8 == 0 and not cuts_prefix


@torch.compiler.disable(
    reason="it follows each batch's own structure: compiled layers end before it and begin again behind it"
)
def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """[N, H, d] by SDPA."""
    blocks, place = layout.blocks()
    return torch.cat([_block_attention(q, k, v, block, scaling, window, softcap) for block in blocks])[place]


def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, block: _Block, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """The outputs of one block's queries, flattened: [G * Lq, H, d]."""
    qb = q[block.queries].transpose(1, 2)  # [G, H, Lq, d]
    kb, vb = k[block.keys].transpose(1, 2), v[block.keys].transpose(1, 2)
    if window is not None and window >= block.keys.shape[1]:
        window = None
    plain = block.plain and window is None
    if softcap:
        out = _softcapped(qb, kb, vb, block.mask(window), scaling, softcap)
    else:
        out = F.scaled_dot_product_attention(
            qb, kb, vb,
            attn_mask=None if plain else block.mask(window),
            is_causal=plain, scale=scaling, enable_gqa=qb.shape[1] != kb.shape[1],
        )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    """Gemma 2's attention, arXiv 2408.00118: scores pass through softcap * tanh(scores / softcap) before the mask."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(q.dtype) @ v


def register() -> None:
    """Make ``attn_implementation="tppo_packed"`` known to transformers; its layers then need the ``layout`` keyword.

    No mask function goes with it: transformers then makes no mask, and does not wait for the device to look for packed
    sequences in the position ids.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
