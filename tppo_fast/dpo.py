"""Direct preference optimisation on (true queries, own output) pairs: the paper's DPO baseline (TPPO, section 4.1).

The chosen response of a pair is the session's true next queries, the rejected one was sampled by the policy before training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tppo_fast import finetune, packing, preflight, seeding
from tppo_fast.algorithms.base import owners
from tppo_fast.compiling import compile_layers
from tppo_fast.data_types import Prompt, RolloutBatch
from tppo_fast.errors import UserError
from tppo_fast.finetune_config import DPOConfig, DPOSection
from tppo_fast.hashing import sha256_of
from tppo_fast.labelling.journal import Journal, fill
from tppo_fast.model import Actor
from tppo_fast.rollout import RolloutEngine, SamplingParams, build_engine
from tppo_fast.run_dir import open_run_dir
from tppo_fast.runs import load_sessions
from tppo_fast.sections import Settings, given
from tppo_fast.sft import check_examples, logprobs, packed

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK = 128
"""Sessions in one call of the engine; fixed, since it decides which random numbers a response gets."""
Sides = tuple[Sequence[Prompt], Sequence[Sequence[int]]]
"""Prompts, and the true response to each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to one prompt."""

    prompt: Prompt
    """The history."""
    chosen: Sequence[int]
    """Tokens of the true next queries, with the end-of-sequence token."""
    rejected: Sequence[int]
    """Tokens that the policy sampled."""


def dpo(config: DPOConfig | Settings, *, resume: bool = False) -> finetune.FinetuneResult:
    """Train a policy by DPO against itself and leave it, its metrics and its checkpoints in ``config.run_dir``.

    The reference is the starting policy: a frozen copy, or with ``model.lora_rank`` the same weights without adapters.

    Args:
        config: every setting, or a nested dict or the path of a TOML file of them; ``model.path`` should be an SFT policy.
        resume: continue the newest checkpoint of ``run_dir``, bit for bit as if it had never stopped.

    Raises:
        UserError: bad settings, data or model, or no pair whose two sides differ.
        TrainingDiverged: the loss or gradient is not finite; a report is in ``run_dir`` and earlier checkpoints stay.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint of the last finished step was saved.
    """
    config = given(config, DPOConfig)
    preflight.check(config, resume)
    with seeding.restored(), open_run_dir(config, resume) as start_from:
        return _train(config, start_from)


def _train(config: DPOConfig, start_from: Path | None) -> finetune.FinetuneResult:
    train_sessions, held_sessions = load_sessions(config)
    train_sessions = train_sessions[: config.dpo.max_pairs]
    held_sessions = held_sessions[: config.train.eval_prompts]
    actor, tokenizer, builder = finetune.build(config)
    train, held_out = ((builder.prompts(s), builder.responses(s)) for s in (train_sessions, held_sessions))
    for sides in (train, held_out):
        _check_lengths(config, actor.lm.config, sides)
    with contextlib.closing(build_engine(config, tokenizer, actor.device)) as engine:
        engine.load_weights(actor.named_weights(), version=0)  # the sampled side comes from the policy before any step
        pairs = own_output(config, engine, train, "train")
        held_pairs = own_output(config, engine, held_out, "held-out")
        reference = actor.frozen_copy()
        if config.model.compile:  # a copy of compiled layers is not compiled
            compile_layers([reference])
        objective = Preference(
            actor=actor,
            reference=reference,
            pairs=pairs,
            held_out=held_pairs,
            settings=config.dpo,
            seed=config.seed,
            share_prompts=config.model.share_prompts,
        )
        learner = finetune.Learner(actor, config.dpo, config.train.steps, "dpo.lr")
        held = finetune.Held(engine=engine, prompts=held_out[0], builder=builder)
        return finetune.run(config, config.dpo, learner, objective, held, start_from=start_from, name="dpo")


def _check_lengths(config: DPOConfig, model_config: Any, sides: Sides) -> None:
    """Refuse pairs that the model or ``dpo.microbatch_tokens`` may not hold, before one is sampled."""
    examples = list(zip(*sides, strict=True))
    check_examples(config, examples, model_config)
    budget, sampled = config.dpo.microbatch_tokens, config.rollout.max_new_tokens
    if (longest := max(2 * len(p.token_ids) + len(ids) + sampled for p, ids in examples)) > budget:
        raise UserError(
            f"dpo.microbatch_tokens = {budget}: a pair may need {longest} tokens; raise it, or shorten prompts "
            "(data.max_prompt_tokens) or responses (rollout.max_new_tokens)"
        )


def own_output(config: DPOConfig, engine: RolloutEngine, sides: Sides, name: str) -> list[Pair]:
    """One pair for each session whose sampled response differs from the true one.

    What was sampled is kept in ``run_dir`` as it comes: a run that was stopped goes on from there, one that is resumed has the
    same pairs without sampling again.

    Raises:
        UserError: the policy already gives the true queries everywhere.
        Interrupted: SIGINT, SIGTERM or SIGHUP; what was sampled is kept.
    """
    prompts, truth = sides

    def sample(numbers: Sequence[int]) -> list[dict[str, Any]]:
        sampling = SamplingParams(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            seed=seeding.derive(config.seed, "own output", name, numbers[0]),
        )
        rollouts = engine.generate([prompts[i] for i in numbers], sampling)
        return [{"token_ids": list(rollout.token_ids)} for rollout in rollouts]

    source = _source(config, prompts)
    keys = [f"{source}/{number}" for number in range(len(prompts))]
    with Journal(config.run_dir / f"own-output-{name}.jsonl") as journal:
        fill(journal, keys, sample, chunk=CHUNK, concurrency=0, verb=f"sample ({name})", unit="session")
        own = [journal.entries[key]["token_ids"] for key in keys]
    pairs = [Pair(prompt=p, chosen=t, rejected=o) for p, t, o in zip(prompts, truth, own, strict=True) if list(t) != o]
    if not pairs:
        raise UserError(f"every sampled {name} response equals the true one: there is no pair to learn from")
    return pairs


def _source(config: DPOConfig, prompts: Sequence[Prompt]) -> str:
    """A hash of what responses are sampled from and how: an earlier run in the folder may have had another policy."""
    folder = Path(config.model.path)
    policy = sha256_of(folder) if folder.exists() else "of the hub"
    how = [config.seed, config.rollout.engine, config.rollout.max_new_tokens, config.rollout.temperature]
    made_of = [policy, config.model.model_dump(mode="json"), how, [list(p.token_ids) for p in prompts]]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """The DPO objective over pairs; see ``dpo_loss``."""

    actor: Actor
    reference: Actor
    pairs: Sequence[Pair]
    held_out: Sequence[Pair]
    settings: DPOSection
    seed: int
    share_prompts: bool

    def gradient(self, step: int) -> finetune.Metrics:
        size = self.settings.batch_size
        chosen = seeding.batch(self.seed, "dpo", step, size=size, count=len(self.pairs))
        return self._sums([self.pairs[i] for i in chosen], learn=True)

    @torch.no_grad()
    def evaluate(self) -> finetune.Metrics:
        found = self._sums(self.held_out, learn=False)
        return {"eval/loss": found["fit/loss"]}

    def _sums(self, pairs: Sequence[Pair], *, learn: bool) -> finetune.Metrics:
        """Means over the pairs; with ``learn`` their gradient too, microbatch by microbatch."""
        batch = packed(
            [(p.prompt, ids) for p in pairs for ids in (p.chosen, p.rejected)], share_prompts=self.share_prompts
        )
        totals: dict[str, float] = {}
        for group in _pair_groups(batch, self.settings.microbatch_tokens):
            part = packing.select(batch, group)[0].to(self.actor.device)
            with torch.no_grad():
                ref = sequence_sums(logprobs(self.reference, part), part)
            logp = sequence_sums(logprobs(self.actor, part), part)
            losses, chosen, rejected = dpo_loss(
                logp[::2],
                logp[1::2],
                ref[::2],
                ref[1::2],
                beta=self.settings.beta,
                smoothing=self.settings.label_smoothing,
            )
            if learn:
                (losses.sum() / len(pairs)).backward()
            sums = {
                "fit/loss": losses, "dpo/accuracy": (chosen > rejected).float(), "dpo/margin": chosen - rejected,
                "dpo/chosen_reward": chosen, "dpo/rejected_reward": rejected,
            }  # fmt: skip
            for metric, values in sums.items():
                totals[metric] = totals.get(metric, 0.0) + float(values.detach().sum())
        means = {metric: total / len(pairs) for metric, total in totals.items()}
        return means | {"fit/tokens": float(batch.num_actions)}


def dpo_loss(
    chosen: Float[Tensor, "P"],
    rejected: Float[Tensor, "P"],
    ref_chosen: Float[Tensor, "P"],
    ref_rejected: Float[Tensor, "P"],
    *,
    beta: float,
    smoothing: float = 0.0,
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"], Float[Tensor, "P"]]:
    """(loss of each pair, implicit reward of its chosen side, of its rejected side), arXiv 2305.18290, eq. 7.

    With ``d = beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected))`` the loss is
    ``-(1 - e) log sigmoid(d) - e log sigmoid(-d)``, e the label smoothing (conservative DPO).

    Args:
        chosen, rejected: [P] summed log-probabilities of whole responses, differentiable.
        ref_chosen, ref_rejected: the same under the reference.
        beta: above 0.
        smoothing: assumed share of pairs in the wrong order.
    """
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = good - bad
    losses = -(1.0 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)
    return losses, good.detach(), bad.detach()


def sequence_sums(values: Float[Tensor, "A"], batch: RolloutBatch) -> Float[Tensor, "B"]:
    """The sum of each response's values."""
    return values.new_zeros(batch.num_sequences).index_add(0, owners(batch), values)


def _pair_groups(batch: RolloutBatch, budget: int) -> list[list[int]]:
    """Microbatches of whole pairs: sequences 2 i and 2 i + 1 are one pair and stay together.

    A pair's gradient needs both of its sides at once.

    Raises:
        UserError: one pair alone is over the budget.
    """
    lengths = [len(r) for r in packing.responses(batch)]
    prompts = [len(p) for p in packing.prompts(batch)]
    cost = [lengths[i] + lengths[i + 1] + 2 * prompts[i] for i in range(0, len(lengths), 2)]
    if max(cost) > budget:
        raise UserError(
            f"dpo.microbatch_tokens = {budget}: a pair needs {max(cost)} tokens; raise it, or lower data.max_prompt_tokens"
        )
    groups: list[list[int]] = []
    load = budget
    for pair in sorted(range(len(cost)), key=lambda i: -cost[i]):
        if load + cost[pair] > budget:
            groups.append([])
            load = 0
        groups[-1] += [2 * pair, 2 * pair + 1]
        load += cost[pair]
    return groups
