"""Tensors of the trainer that wait in pinned main memory while the rollout engine needs the GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Parked:
    """Weights and optimizer states that ``out`` moves to main memory and ``back`` to the device, bit for bit.

    The pinned buffers are made once and used again: pinning is slow, copying from and to them is not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[Any, Tensor] = {}
        self.is_out = False

    def out(self, weights: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Move all to main memory; a second call in a row does nothing."""
        if self.is_out:
            return
        for weight in weights:
            weight.data = self._to_host(id(weight), weight.data)
        for key, slots, name in _states(optimizer):
            slots[name] = self._to_host(key, slots[name])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copies read what may be given away next
        self.is_out = True

    def back(self, weights: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Move all to the device again, without waiting for the copies."""
        if not self.is_out:
            return
        for weight in weights:
            weight.data = weight.data.to(self._device, non_blocking=True)
        for _, slots, name in _states(optimizer):
            slots[name] = slots[name].to(self._device, non_blocking=True)
        self.is_out = False

    def _to_host(self, key: Any, tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return tensor.to("cpu")  # a quantised state is made of several tensors, and cannot be pinned
        if key not in self._buffers:
            pinned = self._device.type == "cuda"
            self._buffers[key] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return self._buffers[key].copy_(tensor, non_blocking=True)


def _states(optimizer: torch.optim.Optimizer) -> list[tuple[Any, dict[str, Any], str]]:
    """(key, slots, name) of every state tensor that is worth moving; step counts are not."""
    return [
        ((id(parameter), name), slots, name)
        for parameter, slots in optimizer.state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor) and value.dim()
    ]


def unshared(modules: Iterable[nn.Module | None], kept: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``modules`` that are not also ``kept``'s, each once."""
    stay = {id(p) for p in kept.parameters()}
    found = {id(p): p for module in modules if module is not None for p in module.parameters() if id(p) not in stay}
    return list(found.values())
