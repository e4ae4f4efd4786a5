"""The arithmetic that a pass needs, from the models' sizes: what MFU and balanced microbatches count by.

Forward: 2 FLOPs for each weight and token, 4 for each visible (query, key) pair and head dimension (PaLM, arXiv 2204.02311,
appendix B, with the causal pairs alone, and those in a layer's sliding window; chunked attention counts as full). Backward: the
same again for the gradients of activations, and of weights where they learn. What is recomputed, padded or read twice is work
done, not work needed, and counts nothing.
"""

from __future__ import annotations

import collections
import functools
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from tppo_fast.data_types import RolloutBatch

DATASHEET = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12, "MI300X": 1307e12,
}  # fmt: skip
"""Part of a GPU's name -> its dense bf16 FLOP per second, by its maker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """FLOPs of one transformer body and head, as the module docstring counts them."""

    token: float
    """Forward, for each token."""
    token_backward: float
    """Backward, for each token."""
    pair: float
    """Forward, for each (query, key) pair that is visible in every layer; backward takes twice that."""
    windows: tuple[int | None, ...]
    """Of each layer, how many keys a query looks at, itself included; None: all before it."""
    action: float
    """Forward of the head, for each action; 0 without a head."""
    action_backward: float
    """Backward of the head, for each action."""

    def forward(self, tokens: int, pairs: float, actions: int) -> float:
        """FLOPs of a pass that keeps nothing."""
        return self.token * tokens + self.pair * pairs + self.action * actions

    def training(self, tokens: int, pairs: float, actions: int) -> float:
        """FLOPs of a pass and its gradients."""
        back = self.token_backward * tokens + 2 * self.pair * pairs + self.action_backward * actions
        return self.forward(tokens, pairs, actions) + back


def costs(body: nn.Module, head: nn.Module | None = None) -> Costs:
    """Of a transformers body (of experts, those that a token visits) and, where there is one, its language-model head."""
    settings: Any = body.config.get_text_config()  # type: ignore[union-attr,operator]
    tables = {id(m.weight) for m in body.modules() if isinstance(m, nn.Embedding)}  # looked up, not multiplied
    experts = getattr(settings, "num_local_experts", None) or getattr(settings, "num_experts", None) or 1
    visited = (getattr(settings, "num_experts_per_tok", None) or experts) / experts
    token = backward = 0.0
    for weight in {id(p): p for p in body.parameters()}.values():
        if weight.dim() < 2 or id(weight) in tables:
            continue
        used = 2.0 * weight.numel() * (visited if weight.dim() == 3 else 1.0)
        token += used
        backward += used * (1 + weight.requires_grad)
    action = 0.0 if head is None else 2.0 * head.weight.numel()  # type: ignore[union-attr,operator]
    learns = head is not None and head.weight.requires_grad  # type: ignore[union-attr]
    return Costs(
        token=token,
        token_backward=backward,
        pair=2.0 * settings.num_attention_heads * _head_sizes(settings) * settings.num_hidden_layers,
        windows=_windows(settings),
        action=action,
        action_backward=action * (1 + bool(learns)),
    )


def _head_sizes(settings: Any) -> int:
    """Numbers that a head multiplies for a pair: its query with the key, and the value."""
    if (
        getattr(settings, "qk_nope_head_dim", None) is not None
    ):  # latent attention, whose head_dim is the rotary part alone
        return settings.qk_nope_head_dim + settings.qk_rope_head_dim + settings.v_head_dim
    return 2 * (getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads)


def _windows(settings: Any) -> tuple[int | None, ...]:
    """As transformers' masks: a config without layer types has its window in all layers."""
    window = getattr(settings, "sliding_window", None)
    kinds = getattr(settings, "layer_types", None) or ["sliding_attention"] * settings.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def visible_pairs(batch: RolloutBatch, windows: tuple[int | None, ...] = (None,)) -> float:
    """(query, key) pairs that attention must look at, a layer's mean: causal in a segment, and all of the segment's prefix;
    ``windows``: see ``Costs``."""
    lengths = [end - start for start, end in pairwise(batch.cu_seqlens.tolist())]
    before = [0 if p < 0 else lengths[p] for p in batch.prefix.tolist()]

    def pairs(window: int | None) -> int:
        return sum(
            _causal(n + prefix, window) - _causal(prefix, window) for n, prefix in zip(lengths, before, strict=True)
        )

    return sum(layers * pairs(window) for window, layers in collections.Counter(windows).items()) / len(windows)


def _causal(length: int, window: int | None) -> int:
    """Pairs of a sequence of its own."""
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


class Counter:
    """Tokens and FLOPs of a phase of PPO, summed over its microbatches; the host knows both without asking the device.

    ``pair_cost`` is what one (query, key) pair costs the policy, in tokens.
    """

    def __init__(self, lm: Any, critic_body: nn.Module | None, *, reference: bool) -> None:
        self._policy = costs(lm.base_model, lm.get_output_embeddings())
        self._critic = None if critic_body is None else costs(critic_body)
        self._reference = reference
        self.pair_cost = self._policy.pair / self._policy.token
        self.reset()

    def reset(self) -> None:
        """A phase begins."""
        self._tokens, self._flop = 0, 0.0

    def prepared(self, batch: RolloutBatch) -> None:
        """A microbatch was read without gradients, by the policy, the reference and the critic."""
        self._tokens += batch.num_tokens
        self._flop += self._policy.forward(*_size(batch, self._policy)) * (1 + self._reference)
        self._flop += self._critic.forward(*_size(batch, self._critic)) if self._critic else 0.0

    def updated(self, batch: RolloutBatch, train_policy: bool) -> None:
        """A microbatch was read with gradients; only for the critic where ``train_policy`` is False."""
        self._tokens += batch.num_tokens
        policy = self._policy.training if train_policy else self._policy.forward
        self._flop += policy(*_size(batch, self._policy))
        self._flop += self._critic.training(*_size(batch, self._critic)) if self._critic else 0.0

    def metrics(self, phase: str) -> dict[str, float]:
        """What was counted since the phase began."""
        return {f"perf/{phase}_tokens": float(self._tokens), f"perf/{phase}_tflop": self._flop / 1e12}


def _size(batch: RolloutBatch, costs: Costs) -> tuple[int, float, int]:
    """(tokens, pairs, actions)."""
    return batch.num_tokens, visible_pairs(batch, costs.windows), batch.num_actions


@functools.cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second that the device can reach: the datasheet's in bf16 where it is known, else of a product just timed."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = next((rate for part, rate in DATASHEET.items() if part in name), None)
        if known is not None:
            return known
    return _measured_rate(device, dtype)


def _measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best of five square products, of a size that takes milliseconds."""
    n = 8192 if device.type == "cuda" else 768
    a = torch.randn(n, n, device=device, dtype=dtype)  # ones are multiplied faster, at less power
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product = a @ a
        if product.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * n**3 / best
