"""torch.compile where packed batches allow it: a few graphs for any number of tokens.

A decoder layer sees [1, N, D] with another N in every microbatch: it is compiled with N as a symbol. With the flash kernels a
layer is one graph, packed attention an opaque op in it (``attention_varlen.attend``); torch's SDPA follows each batch's own
blocks, and parts the graph. All layers of a model share their graphs, which are made for kinds of calls (with gradients or
without, say), never for lengths.

What a layer keeps for its backward pass are the results of GEMMs and attention alone: norms, activations and casts, which GEMMs
read, are computed again. By default the compiler keeps those too, a third more (Qwen3's shape), and spares elementwise kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._functorch import config as partitioning
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(models: Iterable[nn.Module | None], *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile, in place, every layer of ``models``; returns how many layers that were."""
    count, backend = 0, _keeping_little(backend)
    # All layers share one cache of graphs: one for each kind of call (gradients or none, a frozen copy in bf16, a window, ...).
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for model in models:
        for layer in model.modules() if model is not None else ():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True, backend=backend)
                count += 1
    return count


@cache  # graphs are shared only within one backend
def _keeping_little(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The backend, for graphs whose forward pass keeps no elementwise result for a GEMM of the backward pass."""
    compile_graph: Any = torch._dynamo.lookup_backend(backend)

    def run(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        with partitioning.patch(ban_recompute_materialized_backward=False):
            return compile_graph(graph, inputs)

    return run
