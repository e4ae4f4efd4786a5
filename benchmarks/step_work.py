"""What the step suites ask of every provider, and the providers' rows: how each differs from the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks import providers
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
    small: bool = False
    """A small model, where every row has its minutes."""
    lr: float = 1e-5

    @property
    def label(self) -> str:
        """The model and the sizes, as cases are called."""
        prompts = f"{self.prompts} prompt{'s' if self.prompts > 1 else ''} of {self.prompt_tokens}"
        return f"{self.name}, {prompts}, {self.samples} responses of {self.new_tokens}"

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

    @property
    def name(self) -> str:
        return self.provider.split(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows that do the same work."""

    title: str
    work: Work
    rows: Sequence[Row]
    levers: bool = False
    """Counted instead, once, without sampling."""

    @property
    def case(self) -> str:
        """What tables call it."""
        return f"{self.title}, {self.work.label}"


TRL = Row(provider="TRL PPO", baseline=True)
PADDED = ("reward", "policy_loss", "value_loss", "entropy")
"""What the padded baseline tells."""
LEVERS_OFF: dict[str, Any] = {"settings": UNSHARED_PROMPTS, "row_local": False}


def whole(*, small: bool, vllm: bool = True) -> tuple[Row, ...]:
    """The rows of a PPO iteration. One body for policy and critic learns another function than TRL's two: it must reproduce
    the padded baseline with one body. With the real model that would take minutes: there it must reproduce ours with its other
    levers off, which is held to TRL's first iteration, whose losses precede the step."""
    own: dict[str, Any] = {"like": "TRL PPO"}
    padded = Row(provider="padded PyTorch: shared body", changes={"settings": SHARED, "padded": True, "rollout": True})
    plain = Row(
        provider="tppo_fast: shared body, prompts not shared, head at 4 GEMMs",
        changes={**LEVERS_OFF, "rollout": True}, like="TRL PPO", first=True, learned=False,
    )  # fmt: skip
    truth = padded if small else plain
    one_body: dict[str, Any] = {"like": truth.provider, **({"metrics": PADDED} if small else {})}
    rows = [
        TRL,
        Row(provider="tppo_fast: own critic", changes={"settings": OWN, "rollout": True}, **own),
        Row(provider="tppo_fast: shared body", changes={"settings": SHARED, "rollout": True}, **one_body),
        truth,
    ]
    if vllm:
        changes = {"settings": SHARED, "rollout": "vllm"}
        rows.insert(3, Row(provider="tppo_fast: shared body, vLLM", changes=changes, **one_body))
    if small:
        changes = {"settings": OWN, "padded": True, "rollout": True}
        rows.insert(-1, Row(provider="padded PyTorch", changes=changes, metrics=PADDED, **own))
    else:  # a pass of ours reads 768 tokens there, TRL's of 8 responses 4,352, of one 544
        rows.insert(1, Row(provider="TRL PPO: one response a pass", changes={"microbatch": 1}, **own))
    return tuple(rows)


GRPO = (
    Row(provider="TRL GRPO", baseline=True),
    Row(
        provider="tppo_fast: GRPO",
        changes={"algorithm": "grpo", "settings": OWN, "rollout": True, "reference": False},
        like="TRL GRPO",
        metrics=("reward", "entropy"),
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
    """A small model with several prompts and optimizer steps, once with long prompts and many samples, once with neither; and
    the real one with long prompts. ``options.shape`` replaces sizes, and leaves the second shape out.

    Raises:
        UserError: there is no model at ``options.model``, or the sizes do not fit.
    """
    folder = options.scratch / "step-model"
    if not (folder / "config.json").exists():
        _write_small(folder)
    sizes = {"prompts": 16, "prompt_tokens": 128, "samples": 8, "new_tokens": 32, "microbatch": 64}
    tiny = {"prompts": 2, "prompt_tokens": 24, "samples": 4, "new_tokens": 4, "microbatch": 4}
    small = Work(
        name="small Llama", model=folder, small=True, epochs=2, iterations=2, rounds=1 if options.quick else 3,
        **(tiny if options.quick else sizes),
    )  # fmt: skip
    if options.quick:
        return [_shaped(small, options.shape)]
    if not (options.model / "config.json").exists():
        raise UserError(f"--model {options.model}: no model folder there; make smollm2 writes one to .cache/smollm2")
    unshared = {"prompts": 32, "prompt_tokens": 32, "samples": 2, "new_tokens": 64, "microbatch": 32}
    real = Work(
        name="SmolLM2-135M" if options.model.name == "smollm2" else options.model.name, model=options.model,
        prompts=1, prompt_tokens=512, samples=8, new_tokens=32, epochs=1, iterations=3, rounds=1, microbatch=8,
    )  # fmt: skip
    if options.shape:
        return [_shaped(small, options.shape), _shaped(real, options.shape)]
    return [small, replace(small, rounds=2, **unshared), real]


def _shaped(work: Work, shape: Mapping[str, int]) -> Work:
    """The work in other sizes."""
    sized = replace(work, **shape)
    sequences = sized.prompts * sized.samples
    if "microbatch" not in shape:
        return replace(sized, microbatch=math.gcd(work.microbatch, sequences))
    if sequences % sized.microbatch:
        raise UserError(
            f"--microbatch {sized.microbatch}: it must divide the {sequences} responses of an iteration; give another, or "
            "other --prompts or --samples"
        )
    return sized


def comparisons(options: Options) -> list[Comparison]:
    """What the suite runs. A provider with a driver that has no row above is compared with ours by itself. Of
    ``options.providers`` only those comparisons that one of them takes part in, with ours and what a row must be like.

    Raises:
        UserError: as ``works``, or a provider is unknown or has no row.
    """
    chosen, asked = providers.chosen("step", options.providers), works(options)
    small, large = asked[0], asked[-1]
    plan = [Comparison(title="PPO iteration", work=work, rows=whole(small=False)) for work in asked if not work.small]
    plan += [
        Comparison(title="PPO iteration", work=work, rows=whole(small=True, vllm=work is small))
        for work in asked
        if work.small
    ]
    plan += [Comparison(title="GRPO iteration", work=small, rows=GRPO)]
    known = {row.name for comparison in plan for row in comparison.rows}
    plan += [
        Comparison(title=f"PPO iteration against {peer.name}", work=work, rows=against(peer.name))
        for peer in chosen
        if peer.driver and peer.name not in known
        for work in dict.fromkeys((large, small))
    ]
    plan += [Comparison(title="PPO levers", work=large, rows=LEVERS, levers=True)]
    if options.providers is None:
        return plan
    known = {row.name for comparison in plan for row in comparison.rows}
    if rowless := next((peer for peer in chosen if peer.name not in known), None):
        raise UserError(f"--providers {rowless.name!r}: it has no row in step, for {rowless.missing()}; leave it out")
    others = {peer.name for peer in chosen} - {"tppo_fast"}
    taking_part = [c for c in plan if not others or others & {row.name for row in c.rows}]
    return [replace(c, rows=_kept(c.rows, others)) for c in taking_part]


def against(peer: str) -> tuple[Row, ...]:
    """A driver's row, and ours with the same losses, in which the peer decides the responses."""
    return (
        Row(provider=peer, baseline=True),
        Row(provider="tppo_fast: own critic", changes={"settings": OWN, "rollout": True}, like=peer),
    )


def _kept(rows: Sequence[Row], others: set[str]) -> tuple[Row, ...]:
    """Ours, those of ``others``, and those that one of them must be like."""
    kept = {row.provider for row in rows if row.name in others | {"tppo_fast"}}
    while more := {row.like for row in rows if row.provider in kept and row.like} - kept:
        kept |= more
    return tuple(row for row in rows if row.provider in kept)


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
