"""torch.compile where packed batches allow it: a few graphs for any number of tokens.

A decoder layer sees [1, N, D] with another N in every microbatch: it is compiled with N as a symbol. With the flash kernels a
layer is one graph, packed attention an opaque op in it (``attention_varlen.attend``); torch's SDPA follows each batch's own
blocks, and parts the graph. All layers of a model share their graphs, which are made for kinds of calls (with gradients or
without, say), never for lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(models: Iterable[nn.Module | None], *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile, in place, every layer of ``models``; returns how many layers that were."""
    count = 0
    for model in models:
        for layer in model.modules() if model is not None else ():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True, backend=backend)
                count += 1
    return count
