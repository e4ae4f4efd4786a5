"""What a phase costs on any machine: FLOPs by torch's counter, with the formulas that it lacks, and the peak of live bytes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import tppo_kernels  # noqa: F401  (registers its ops)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")
aten = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products over all pairs of positions, as torch counts its CUDA kernel: [.., H, Lq, d] with [.., Lk, d]."""
    del value, out_shape
    return 4 * math.prod(query) * key[-2]


def _attention_backward_flops(grad: Any, query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    del grad, out_shape
    return 10 * math.prod(query) * key[-2]


def _head_flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """One unit: the logits."""
    return 2 * hidden[0] * math.prod(weight)


def _head_backward_flops(hidden: Any, weight: Any, *rest: Any, **__: Any) -> int:
    """The logits again, and a product for each gradient that is wanted."""
    return (1 + sum(rest[7][:2])) * 2 * hidden[0] * math.prod(weight)


FORMULAS = {  # what torch's counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.tppo_kernels.native_linear_logprobs: _head_flops,
    torch.ops.tppo_kernels.native_linear_logprobs_backward: _head_backward_flops,
}


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of tensors made inside, as operators make them and the last reference drops them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage(), given)
        return out

    def _see(self, storage: Any, given: list[Any]) -> None:
        if storage in self._known or any(storage is g for g in given):
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def counted(name: str, run: Callable[[], Result], found: dict[str, Any]) -> Result:
    """What ``run`` returns; its FLOPs and live bytes go into ``found`` under the phase's name.

    Live bytes are those of tensors made inside (gradients and activations, too) beyond what lived before the phase.
    """
    with LiveBytes() as live, FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops:
        out = run()
    found |= {f"{name}_flops": flops.get_total_flops(), f"{name}_live_bytes": live.peak}
    return out
