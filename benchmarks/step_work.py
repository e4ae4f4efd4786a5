"""What the step suites ask of every provider, and the providers' rows: how each differs from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks.results import Options
from tppo_fast import scratch
from tppo_fast.atomic import atomic_folder
from tppo_fast.errors import UserError

OWN = {"model": {"shared_body": False}}
SHARED = {"model": {"shared_body": True}}
UNSHARED_PROMPTS = {"model": {"shared_body": True, "share_prompts": False}}
ALL_OFF = {"model": {"shared_body": False, "share_prompts": False}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every provider is asked to do."""

    name: str
    model: Path
    prompts: int
    prompt_tokens: int
    samples: int
    new_tokens: int
    epochs: int
    iterations: int
    """With more than one, the first warms up and is not kept."""
    rounds: int
    """Turns of every row."""
    microbatch: int
    """Responses in one forward and backward pass."""
    lr: float = 1e-5

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "prompts": self.prompts,
            "prompt tokens": self.prompt_tokens,
            "samples": self.samples,
            "new tokens": self.new_tokens,
        }

    def request(self, threads: int, **changes: Any) -> dict[str, Any]:
        """``threads`` and what a row changes."""
        given = {n: getattr(self, n) for n in ("samples", "new_tokens", "epochs", "iterations", "microbatch", "lr")}
        return {
            **given, "model": str(self.model.resolve()), "threads": threads, "bfloat16": False, "adam_beta2": 0.999,
            "max_grad_norm": 1e9, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_coef": 0.1, **changes,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A provider's way to do the work."""

    provider: str
    """A name of ``providers.PROVIDERS``, with ": variant"."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in the request."""
    like: str | None = None
    """The row whose metrics it must reproduce."""
    metrics: tuple[str, ...] = ("reward", "kl", "policy_loss", "value_loss", "entropy")
    """Those of them that must agree."""
    learned: bool = True
    """Whether both must have taught the policy the same."""
    first: bool = False
    """Only in the first iteration: after a step it is another function that learns."""
    baseline: bool = False
    """Ratios refer to it."""
    small_only: bool = False
    """Left out with the real model, where minutes are dear."""

    @property
    def name(self) -> str:
        return self.provider.split(":")[0]


TRL = Row(provider="TRL PPO", baseline=True)
PADDED = {"metrics": ("reward", "policy_loss", "value_loss", "entropy"), "small_only": True}


def whole(*, small: bool) -> tuple[Row, ...]:
    """The rows of a PPO iteration. One body for policy and critic learns another function than TRL's two: the padded baseline
    with one body is what it must reproduce; with the real model, which takes one step, it is held to that step's losses."""
    one_body: dict[str, Any] = (
        {"like": "padded PyTorch: shared body", "metrics": PADDED["metrics"]}
        if small
        else {"like": "TRL PPO", "learned": False}
    )
    own: dict[str, Any] = {"like": "TRL PPO"}
    return (
        TRL,
        Row(provider="tppo_fast: own critic", changes={"settings": OWN, "rollout": True}, **own),
        Row(provider="tppo_fast: shared body", changes={"settings": SHARED, "rollout": True}, **one_body),
        Row(provider="tppo_fast: own critic, vLLM", changes={"settings": OWN, "rollout": "vllm"}, **own),
        Row(provider="tppo_fast: shared body, vLLM", changes={"settings": SHARED, "rollout": "vllm"}, **one_body),
        Row(provider="padded PyTorch", changes={"settings": OWN, "padded": True, "rollout": True}, **own, **PADDED),
        Row(
            provider="padded PyTorch: shared body", changes={"settings": SHARED, "padded": True, "rollout": True}, **PADDED
        ),
    )  # fmt: skip


GRPO = (
    Row(provider="TRL GRPO", baseline=True, small_only=True),
    Row(
        provider="tppo_fast: GRPO",
        changes={"algorithm": "grpo", "settings": OWN, "rollout": True, "reference": False},
        like="TRL GRPO",
        metrics=("reward", "entropy"),
        small_only=True,
    ),
)
ALIKE = ("kl", "policy_loss", "value_loss", "entropy")
"""The same for all in a first step: a critic of its own starts as a copy of the policy's body, with the same value head."""
WITH_NORM = (*ALIKE, "grad_norm")
"""Where the value loss reaches the same weights, the policy's gradient is the same, too."""
LEVERS = (
    Row(
        provider="tppo_fast: shared body",
        changes={"settings": SHARED},
        like="tppo_fast: all levers off",
        metrics=ALIKE,
        learned=False,
    ),
    Row(provider="tppo_fast: all levers off", changes={"settings": ALL_OFF, "row_local": False}, baseline=True),
    Row(
        provider="tppo_fast: own critic",
        changes={"settings": OWN},
        like="tppo_fast: all levers off",
        metrics=WITH_NORM,
    ),
    Row(
        provider="tppo_fast: shared body, prompts not shared",
        changes={"settings": UNSHARED_PROMPTS},
        like="tppo_fast: shared body",
        metrics=WITH_NORM,
    ),
    Row(
        provider="tppo_fast: shared body, head at 4 GEMMs",
        changes={"settings": SHARED, "row_local": False},
        like="tppo_fast: shared body",
        metrics=WITH_NORM,
    ),
)


def works(options: Options) -> list[Work]:
    """A small model with several prompts and optimizer steps, and the real one with long prompts.

    Raises:
        UserError: there is no model at ``options.model``.
    """
    small = options.scratch / "step-model"
    if not (small / "config.json").exists():
        _write_small(small)
    sizes = {"prompt_tokens": 24, "new_tokens": 4} if options.quick else {"prompt_tokens": 128, "new_tokens": 32}
    few = (
        {"prompts": 2, "samples": 4, "microbatch": 4}
        if options.quick
        else {"prompts": 16, "samples": 8, "microbatch": 64}
    )
    first = Work(
        name="small Llama", model=small, epochs=2, iterations=2, rounds=1 if options.quick else 3, **sizes, **few
    )
    if options.quick:
        return [first]
    if not (options.model / "config.json").exists():
        raise UserError(f"--model {options.model}: no model folder there; make smollm2 writes one to .cache/smollm2")
    return [
        first,
        Work(
            name="SmolLM2-135M" if options.model.name == "smollm2" else options.model.name,
            model=options.model,
            prompts=1,
            prompt_tokens=512,
            samples=8,
            new_tokens=32,
            epochs=1,
            iterations=1,
            rounds=2,
            microbatch=8,
        ),
    ]


def _write_small(folder: Path) -> None:
    tokenizer = scratch.byte_bpe(["the next queries of a search session, in the order in which they were asked"] * 8)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        scratch.make(LlamaForCausalLM, scratch.llama_config(tokenizer), 0).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def inputs(work: Work, seed: int, *, responses: bool = False) -> dict[str, Tensor]:
    """Random prompts and a value head small enough to start from; ``responses``: random ones too, for who does not sample."""
    config = AutoConfig.from_pretrained(work.model)
    g = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(3, config.vocab_size, shape, generator=g)

    prompts = ids(work.prompts, work.prompt_tokens)
    found = {"prompts": prompts, "value_head": 0.01 * torch.randn(config.hidden_size, generator=g)}
    if responses:
        repeated = prompts.repeat_interleave(work.samples, 0)
        sequences = torch.cat([repeated, ids(len(repeated), work.new_tokens)], 1)
        found["sequences"] = sequences.repeat(work.iterations, 1, 1)
    return found
