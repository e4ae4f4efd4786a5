"""Checkpoints: safetensors and JSON only, written under a temporary name and renamed once complete.

A checkpoint holds what learns: with ``model.lora_rank`` the adapters alone (peft's format), else the whole policy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tppo_fast import lora, optimizers, seeding
from tppo_fast.atomic import atomic_folder
from tppo_fast.config import Config
from tppo_fast.errors import UserError
from tppo_fast.loading import load_causal_lm
from tppo_fast.ppo import PPO
from tppo_fast.sections import Section

FREE = {"run_dir", "threads", "train"}
"""Settings that may differ when a run is resumed; all others would change what the run computes."""


def save(run_dir: Path, ppo: PPO, tokenizer: Any, config: Config, pending: dict[str, Any] | None = None) -> Path:
    """Write ``run_dir/checkpoints/step_N`` atomically, then drop all but the newest ``keep_checkpoints``.

    ``pending`` is what ``load`` gives back. A step's state is a function of the run, so a complete checkpoint of this step
    is left as it is.
    """
    folder = run_dir / "checkpoints" / f"step_{ppo.step:06d}"
    if folder in list_checkpoints(run_dir):
        return folder
    with atomic_folder(folder) as temporary:
        if config.model.lora_rank:
            lora.save_adapter(ppo.model.actor.lm, temporary / "adapter")
        else:
            ppo.model.actor.save(temporary / "policy", tokenizer)
        save_file(contiguous(_learned(ppo.model.critic)), temporary / "critic.safetensors")
        tensors, groups = flatten(ppo.optimizer.state_dict())
        save_file(tensors, temporary / "optimizer.safetensors")
        state = {
            "ppo": ppo.state(),
            "param_groups": groups,
            "rng": seeding.global_state(),
            "config": config.model_dump(mode="json"),
            "pending": pending,
        }
        (temporary / "state.json").write_text(json.dumps(state))
    for old in list_checkpoints(run_dir)[: -config.train.keep_checkpoints]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if (p / "state.json").is_file())


def check_resumable(run_dir: Path, config: Section, free: Collection[str] = FREE) -> Path:
    """The newest checkpoint, if ``config`` may continue it; the settings in ``free`` may differ.

    Raises:
        UserError: there is no checkpoint, it is damaged, or a setting that changes the result differs.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(
            f"run_dir = {str(run_dir)!r}: there is no checkpoint to resume; leave out --resume to start afresh"
        )
    saved = read_state(checkpoints[-1])["config"]
    now = config.model_dump(mode="json")
    for section in {**saved, **now}:
        was, is_now = saved.get(section), now.get(section)
        if section in free or was == is_now:
            continue
        if isinstance(is_now, dict) and isinstance(was, dict):
            key = next(k for k in {**was, **is_now} if was.get(k) != is_now.get(k))
            section, was, is_now = f"{section}.{key}", was.get(key), is_now.get(key)
        raise UserError(
            f"{section} = {is_now!r}, but the run in {str(run_dir)!r} has {was!r}: use the same value to resume, or "
            "another run_dir"
        )
    _check_length(checkpoints[-1], saved, now)
    return checkpoints[-1]


def _check_length(newest: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Whether the run can end at ``train.steps``: not before it stands there, nor elsewhere than its schedule says."""
    was, steps = (values.get("train", {}).get("steps") for values in (saved, now))
    done = int(newest.name.removeprefix("step_"))
    if steps is not None and steps < done:
        raise UserError(f"train.steps = {steps}, but the run stands at step {done}: give at least as many to resume")
    for section, values in now.items():
        schedule = values.get("lr_schedule", "constant") if isinstance(values, dict) else "constant"
        if schedule != "constant" and steps != was:
            raise UserError(
                f"train.steps = {steps}, but the run has {was}, over which {section}.lr_schedule = {schedule!r} is laid: use the "
                "same value to resume, or another run_dir"
            )


def load(folder: Path, ppo: PPO) -> dict[str, Any] | None:
    """Put a checkpoint's weights, optimizer, counters and generator states in place; returns what was ``pending``.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    state = read_state(folder)
    try:
        if (folder / "adapter").is_dir():
            lora.load_adapter(ppo.model.actor.lm, folder / "adapter")
        else:
            trusted = ppo.config.model.trust_remote_code
            policy = load_causal_lm(str(folder / "policy"), trust_remote_code=trusted)
            ppo.model.actor.lm.load_state_dict(policy.state_dict())
        critic = ppo.model.critic
        critic.load_state_dict({**critic.state_dict(), **load_file(folder / "critic.safetensors")})
        optimizers.load(ppo.optimizer, unflatten(load_file(folder / "optimizer.safetensors"), state["param_groups"]))
        ppo.load_state(state["ppo"])
        seeding.set_global_state(state["rng"])
        return state.get("pending")
    except (UserError, torch.OutOfMemoryError):
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} cannot be loaded ({error}): remove it to resume the one before"
        ) from None


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} is damaged ({error}): remove it to resume the one before"
        ) from None


def _learned(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state without its frozen parameters."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Detached tensors as safetensors wants them."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """An optimizer's state dict as named tensors and JSON groups."""
    tensors: dict[str, torch.Tensor] = {}
    for i, slots in state["state"].items():
        for key, value in slots.items():
            tensors |= optimizers.split(f"{i}.{key}", value)
    return contiguous(tensors), optimizers.numbers(state["param_groups"])


def unflatten(tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict that ``flatten`` took apart."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = tensor
    return {"state": {i: optimizers.join(entries) for i, entries in slots.items()}, "param_groups": groups}
