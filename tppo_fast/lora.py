"""Low-rank adapters (LoRA, arXiv 2106.09685) by the peft library, injected into a causal LM that keeps its class and names.

The frozen weights exist once. The reference policy is the same module tree without adapters, and a critic with a body of its
own has adapters of its own: both SHARE every frozen tensor with the policy, so neither is a second model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tppo_fast import seeding
from tppo_fast.config import ModelConfig
from tppo_fast.errors import UserError

ADAPTER = "default"
_PREFIX = "base_model.model."  # what peft's own files put before the name of a weight


def inject(lm: Any, config: ModelConfig) -> None:
    """Freeze ``lm`` and put adapters of ``config.lora_rank`` around its linear layers, in place. They start as no change.

    Raises:
        UserError: peft is missing, or ``config.lora_targets`` names nothing, or the head or the embeddings.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            f"model.lora_rank = {config.lora_rank} needs the peft package ({error}): pip install 'tppo-fast[lora]', or "
            "set it to 0"
        ) from None
    linear = {name.rpartition(".")[2] for name, m in lm.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    targets = list(config.lora_targets) or sorted(linear)  # peft's "all-linear" would take experts in one tensor, too
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        lora_dropout=0.0,  # the ratio needs deterministic log-probabilities
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in lm.modules()),
    )
    lm.requires_grad_(False)
    try:
        inject_adapter_in_model(settings, lm, adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(f"model.lora_targets = {list(config.lora_targets)}: {' '.join(str(error).split())}") from None
    for what, module in (("head", lm.get_output_embeddings()), ("embeddings", lm.get_input_embeddings())):
        if hasattr(module, "base_layer"):
            raise UserError(
                f"model.lora_targets = {list(config.lora_targets)}: the {what} cannot have adapters; name layers of the body"
            )


def adapted(module: nn.Module) -> bool:
    """Whether a module holds adapters."""
    return next(_layers(module), None) is not None


def sharing_frozen(module: Any) -> Any:
    """A deep copy whose frozen parameters ARE the original's; what learns is copied."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})


def without_adapters(lm: Any) -> Any:
    """The module tree as it was before ``inject``, on the same frozen parameters."""
    bare = copy.deepcopy(lm, {id(p): p for p in lm.parameters()})
    for name, layer in list(_layers(bare)):
        bare.set_submodule(name, layer.base_layer)
    del bare.peft_config
    return bare


def merged_weights(lm: Any, *, to_bfloat16: bool = False) -> Iterator[tuple[str, Tensor]]:
    """W + B A alpha / r under transformers' names, one weight at a time; ``lm`` is not touched.

    Where the sum is stored in bfloat16 (``to_bfloat16``, or W is) it is rounded stochastically: W mostly has no digits to
    lose, so that rounding to nearest would drop whatever is below half of its last one, the adapters of many steps.
    """
    layers = dict(_layers(lm))
    for name, tensor in lm.state_dict().items():
        owner, is_base, rest = name.partition(".base_layer.")
        if is_base:
            yield (
                f"{owner}.{rest}",
                _merged(name, tensor, layers[owner], to_bfloat16) if rest == "weight" else tensor.detach(),
            )
        elif name.partition(".lora_")[0] not in layers:
            yield name, tensor.detach()


def _merged(name: str, weight: Tensor, layer: Any, to_bfloat16: bool) -> Tensor:
    merged = weight.detach().float() + layer.get_delta_weight(ADAPTER).detach()
    if not to_bfloat16 and weight.dtype != torch.bfloat16:
        return merged.to(weight.dtype)
    draw = torch.Generator(merged.device).manual_seed(
        seeding.derive(0, "merge", name)
    )  # the same in every step: where an
    below = torch.randint(
        0, 1 << 16, merged.shape, dtype=torch.int32, device=merged.device, generator=draw
    )  # entry was
    bits = merged.view(torch.int32).add_(below).bitwise_and_(-1 << 16)  # rounded up it stays so while its sum grows
    return bits.view(torch.float32).bfloat16()


def save_adapter(lm: Any, folder: Path) -> None:
    """Write the adapters as peft does: adapter_config.json and adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    lm.peft_config[ADAPTER].save_pretrained(folder)
    tensors = get_peft_model_state_dict(lm, adapter_name=ADAPTER)
    save_file(
        {_PREFIX + name: t.detach().contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors"
    )


@torch.no_grad()
def load_adapter(lm: Any, folder: Path) -> None:
    """Put saved adapters in place, bit for bit.

    Raises:
        ValueError: the file holds other adapters than the model.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(lm, adapter_name=ADAPTER)  # the live tensors, under the file's names
    saved = load_file(folder / "adapter_model.safetensors")
    if {_PREFIX + name for name in own} != saved.keys():
        raise ValueError("its adapters are not those of model.lora_rank and model.lora_targets")
    for name, tensor in own.items():
        tensor.copy_(saved[_PREFIX + name])


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every adapted layer with its name."""
    for name, layer in module.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
            yield name, layer
