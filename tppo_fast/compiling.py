"""torch.compile where packed batches allow it: one graph for any number of tokens, in a bounded number of graphs.

Packed attention follows each batch's own structure and stays as it is. What lies around it in a layer, the feed-forward
network and the norms, sees [1, N, D] with another N in every microbatch: it is compiled with N as a symbol, so that graphs
are made for kinds of calls (with gradients or without, say), never for lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(models: Iterable[nn.Module | None], *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile, in place, what is not attention in every layer of ``models``; returns how many modules that were."""
    count = 0
    for model in models:
        for layer in model.modules() if model is not None else ():
            if isinstance(layer, GradientCheckpointingLayer):
                for name, part in layer.named_children():
                    if name not in ("self_attn", "attn", "attention", "self_attention"):
                        part.compile(dynamic=True, backend=backend)
                        count += 1
    return count
