"""What learns with: torch's fused AdamW, or torchao's with states of 8 bits; and weights that are stored in half precision.

| ``ppo.optimizer``, ``ppo.weights`` | bytes for each weight that learns: weight + gradient + states |
|---|---|
| adamw, float32 | 4 + 4 + 8 |
| adamw8bit, float32 | 4 + 4 + 2 |
| adamw8bit, bfloat16 | 2 + 4 + 2 |

A step of 8 bits dequantises, computes AdamW in fp32 and quantises again in blocks of 256 (Dettmers et al., arXiv 2110.02861),
with the codes of ``code_maps`` in place of torchao's own.
Weights in bfloat16 are rounded stochastically (up with the probability of what rounding down would lose), or small steps
would vanish; gradients are summed in fp32 all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import get_scheduler

from tppo_fast.config import PPOConfig
from tppo_fast.errors import UserError

MASTER = torch.float32
"""Gradients are always summed in it."""


def build(groups: Sequence[tuple[list[nn.Parameter], float]], config: PPOConfig) -> torch.optim.Optimizer:
    """The optimizer of (parameters, learning rate) groups.

    Raises:
        UserError: the optimizer's library is missing, or does not fit this torch.
    """
    params = [{"params": parameters, "lr": lr} for parameters, lr in groups]
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(params, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise UserError(
            f'ppo.optimizer = "{config.optimizer}" needs the torchao package ({error}): pip install '
            "'tppo-fast[adamw8bit]', or set it to \"adamw\""
        ) from None
    signed_codes, unsigned_codes = code_maps()

    class Bounded(AdamW8bit):
        """A state carries its codes, into main memory and checkpoints too."""

        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> OptimState8bit:
            state = OptimState8bit.zeros(p.shape, signed, block_size, p.device, dtype=p.dtype)
            state.qmap.copy_(signed_codes if signed else unsigned_codes)
            return state

    return Bounded(params, bf16_stochastic_round=config.weights == "bfloat16", **options)


def code_maps() -> tuple[Tensor, Tensor]:
    """What the 256 codes of a first and of a second moment mean: ascending parts of their block's maximum, ``(256,)`` each.

    Equal ratios, steps of 11.5 %: a first moment is 0 or from 1e-6 to 1, of either sign; a second, its square, from 1e-12 to 1.
    The second is never 0, for an update divides by its root. torchao's codes make a second moment below 1.6e-7 0 and keep the
    first moment beside it: that weight then moves by m / eps, hundreds of learning rates.
    """
    size = torch.logspace(-6, 0, 128, dtype=torch.float64)
    first = torch.cat([-size[1:].flip(0), size.new_zeros(1), size])
    return first.float(), torch.logspace(-12, 0, 256, dtype=torch.float64).float()


def schedule(
    optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int, *, waiting: Sequence[int] | None = None
) -> Any:
    """The learning rate over ``steps`` steps: "constant", "linear" or "cosine" after a linear warm-up.

    ``waiting``: for each group the steps of these that pass before its own schedule begins.
    """
    name = "constant_with_warmup" if name == "constant" else name
    if not waiting or not any(waiting):
        return get_scheduler(name, optimizer, warmup, steps)
    made: list[Any] = [get_scheduler(name, optimizer, warmup, max(steps - wait, 1)) for wait in waiting]
    shapes = [each.lr_lambdas[0] for each in made]
    return LambdaLR(optimizer, [_after(wait, shape) for wait, shape in zip(waiting, shapes, strict=True)])


def _after(wait: int, shape: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: shape(max(step - wait, 0))


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer.found_inf`` (a tensor) makes a step change nothing; else the host must decide."""
    return isinstance(optimizer, torch.optim.AdamW)


def store_in_half(modules: Iterable[nn.Module]) -> None:
    """Turn the weights into bfloat16, in place; what learns low-rank (adapters beside frozen weights) stays fp32.

    A gradient that reaches a weight of bfloat16 is summed in fp32.
    """
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    adapters_learn = any(not p.requires_grad for p in parameters)
    for parameter in parameters:
        if parameter.dtype == torch.float32 and not (adapters_learn and parameter.requires_grad):
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.grad_dtype = MASTER


def bytes_per_weight(config: PPOConfig) -> float:
    """Of the optimizer's states, for each weight that learns; small tensors, which stay in fp32, left out."""
    return 8.0 if config.optimizer == "adamw" else 2 * (1 + 4 / 256)


# -------------------------------------------------------------------- states as plain tensors and numbers


def split(name: str, value: Tensor) -> dict[str, Tensor]:
    """A state tensor under its name; a quantised one as the plain tensors that it is made of, ``name.part``."""
    if not is_traceable_wrapper_subclass(value):
        return {name: value}
    return {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def join(slots: dict[str, Tensor]) -> dict[str, Tensor]:
    """The states of one weight that ``split`` took apart."""
    quantised = {name.partition(".")[0] for name in slots if "." in name}
    if not quantised:
        return slots
    from torchao.optim.subclass_8bit import OptimState8bit

    whole = {name: value for name, value in slots.items() if "." not in name}
    for name in quantised:
        codes, scale, qmap = (slots[f"{name}.{part}"] for part in ("codes", "scale", "qmap"))
        whole[name] = OptimState8bit(codes, scale, qmap, bool(qmap.min() < 0), dtype=torch.float32)
    return whole


def numbers(value: Any) -> Any:
    """Nested dicts and lists with their 0-dimensional tensors (a learning rate, say) as numbers."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(entry) for entry in value]
    return value.item() if isinstance(value, Tensor) else value


def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` where learning rates stay tensors that were tensors."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            group["lr"] = rate.fill_(group["lr"])
