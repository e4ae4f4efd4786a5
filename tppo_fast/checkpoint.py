"""Checkpoints: safetensors and JSON only, written under a temporary name and renamed once complete.

A checkpoint holds what learns: with ``model.lora_rank`` the adapters alone (peft's format), else the whole policy.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
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
from tppo_fast.loading import in_short, read_causal_lm
from tppo_fast.ppo import PPO
from tppo_fast.run_dir import COMPLETE, best_of, bests, list_checkpoints, read_state, step_folders
from tppo_fast.sections import Section


def save(run_dir: Path, ppo: PPO, tokenizer: Any, config: Config, pending: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint of a PPO run, see ``write`` and ``Actor.save``; ``pending`` is what ``load`` gives back."""

    def fill(folder: Path) -> dict[str, Any]:
        if config.model.lora_rank:
            lora.save_adapter(ppo.model.actor.lm, folder / "adapter")
        else:
            ppo.model.actor.save(folder / "policy", tokenizer)
        save_file(contiguous(_learned(ppo.model.critic)), folder / "critic.safetensors")
        return {"ppo": ppo.state(), "pending": pending}

    return write(run_dir, ppo.step, fill, ppo.optimizer, config, keep=config.train.keep_checkpoints)


def write(
    run_dir: Path,
    step: int,
    fill: Callable[[Path], dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    config: Section,
    *,
    keep: int,
) -> Path:
    """Write ``run_dir/checkpoints/step_N`` atomically, then drop all but the newest ``keep``.

    A step's state is a function of the run, so a complete checkpoint of this step is left as it is.

    Args:
        run_dir: of the run.
        step: N.
        fill: writes into the folder what is not written for every kind of run; returns the JSON values that go with it.
        optimizer: its state is written, too, and the random generators'.
        config: of the run, for ``check_resumable``.
        keep: how many checkpoints stay.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    if folder not in list_checkpoints(run_dir):
        with atomic_folder(folder) as temporary:
            state = fill(temporary)
            tensors, groups = flatten(optimizer.state_dict())
            save_file(tensors, temporary / "optimizer.safetensors")
            state |= {"param_groups": groups, "rng": seeding.global_state(), "config": config.model_dump(mode="json")}
            (temporary / COMPLETE).write_text(json.dumps(state))
    kept = list_checkpoints(run_dir)[-keep:]
    for old in [p for p in step_folders(run_dir) if p not in kept]:
        (old / COMPLETE).unlink(missing_ok=True)  # first: what a kill leaves of the folder is then no checkpoint
        shutil.rmtree(old)
    return folder


def drop_best(run_dir: Path, step: int) -> None:
    """Remove what was best before ``step``, but for what a checkpoint names as its best: a run may go on from there."""
    named = {best_of(run_dir, step)}
    for folder in list_checkpoints(run_dir):
        with contextlib.suppress(UserError, KeyError, TypeError):  # a damaged one cannot be gone on from
            named.add(best_of(run_dir, read_state(folder)["best"]["step"]))
    half_written = run_dir.glob(".best-*.tmp")  # by a run that was killed
    for path in {*bests(run_dir), *half_written} - named:
        shutil.rmtree(path)


def load(folder: Path, ppo: PPO) -> dict[str, Any] | None:
    """Put a checkpoint's weights, optimizer, counters and generator states in place; returns what was ``pending``.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    with reading(folder, ppo.optimizer) as state:
        if (folder / "adapter").is_dir():
            lora.load_adapter(ppo.model.actor.lm, folder / "adapter")
        else:
            trusted = ppo.config.model.trust_remote_code
            policy = read_causal_lm(str(folder / "policy"), trust_remote_code=trusted)
            ppo.model.actor.lm.load_state_dict(policy.state_dict())
        critic = ppo.model.critic
        critic.load_state_dict({**critic.state_dict(), **load_file(folder / "critic.safetensors")})
        ppo.load_state(state["ppo"])
    return state.get("pending")


@contextlib.contextmanager
def reading(folder: Path, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """What ``write`` wrote: gives the JSON values, and puts optimizer and generators in place after the body has the rest.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    state = read_state(folder)
    try:
        best = state["best"]["step"] if "best" in state else -1
        if best >= 0 and not best_of(folder.parents[1], best).is_dir():
            raise ValueError(f"{best_of(folder.parents[1], best).name}, which it names, is gone")
        yield state
        optimizers.load(optimizer, unflatten(load_file(folder / "optimizer.safetensors"), state["param_groups"]))
        seeding.set_global_state(state["rng"])
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} cannot be loaded ({in_short(error)}): remove it to resume the one before"
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
