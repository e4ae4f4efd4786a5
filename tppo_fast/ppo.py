"""Token-level PPO on packed rollouts: ``prepare`` (log-probs, values, GAE) and ``update`` (epochs of clipped steps)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import tppo_kernels as tk
from torch import Tensor, nn
from transformers import get_scheduler

from tppo_fast import packing, parity, seeding
from tppo_fast.advantages import penalised_rewards
from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.config import Config, PPOConfig
from tppo_fast.data_types import LossOutput, RolloutBatch, TrainBatch
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.losses import LossFunction
from tppo_fast.metrics import GLOSSARY
from tppo_fast.model import Actor, ActorCritic

Metrics = dict[str, float]


class KLController:
    """The KL coefficient: fixed, or adapted so that the KL stays near a target (arXiv 1909.08593, section 2.2)."""

    def __init__(self, config: PPOConfig) -> None:
        self.coefficient = config.kl_coef
        self._target, self._horizon = config.kl_target, config.kl_horizon

    def observe(self, kl: float, rollouts: int) -> None:
        """Move after a batch whose mean KL per token was ``kl`` nats."""
        if self._target is not None:
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * rollouts / self._horizon


class PPO:
    """Everything that learns. ``step`` counts finished updates; randomness depends on (seed, step) alone."""

    def __init__(
        self, config: Config, model: ActorCritic, reference: Actor | None, loss: LossFunction, *, total_steps: int
    ) -> None:
        self.config = config
        self.algorithm = ALGORITHMS[config.algorithm]
        self.model = model
        self.reference = reference
        self.loss = loss
        self.step = 0
        self.kl = KLController(config.ppo)
        ppo = config.ppo
        self.loss_config = ppo if self.algorithm.needs_critic else ppo.model_copy(update={"value_coef": 0.0})
        self._groups = [[p for p in part.parameters() if p.requires_grad] for part in (model.actor, model.critic)]
        critic_lr = ppo.lr if ppo.critic_lr is None else ppo.critic_lr
        self.optimizer = torch.optim.AdamW(
            [{"params": self._groups[0], "lr": ppo.lr}, {"params": self._groups[1], "lr": critic_lr}],
            betas=(ppo.adam_beta1, ppo.adam_beta2),
            weight_decay=ppo.weight_decay,
        )
        schedule = ppo.lr_schedule if ppo.lr_schedule != "constant" else "constant_with_warmup"
        optimizer_steps = total_steps * ppo.epochs * ppo.minibatches
        self.scheduler = get_scheduler(schedule, self.optimizer, ppo.lr_warmup_steps, optimizer_steps)

    @property
    def device(self) -> torch.device:
        return self.model.actor.device

    # ---------------------------------------------------------------- prepare

    @torch.no_grad()
    def prepare(self, batch: RolloutBatch) -> tuple[TrainBatch, Metrics]:
        """Old and reference log-probabilities, values, advantages and returns for a packed batch."""
        ppo = self.config.ppo
        logprobs, values, ref_logprobs, final_values = self._evaluate(batch)
        old = logprobs if ppo.old_logprobs == "recompute" else batch.behaviour_logprobs
        ref = old if self.reference is None else ref_logprobs
        coefficient = self.kl.coefficient if ppo.kl_placement == "reward" else 0.0
        rewards = penalised_rewards(batch.rewards, old, ref, coefficient)
        group = self.config.rollout.samples_per_prompt
        advantages, returns = self.algorithm.estimate(rewards, values, final_values, batch, group, ppo)
        metrics = {
            "ppo/kl": (old - ref).mean(),
            "ppo/advantage_mean": advantages.mean(),
            "ppo/advantage_std": advantages.std(correction=0),
            **(_critic_metrics(values, returns) if self.algorithm.needs_critic else {}),
            **parity.metrics(batch.behaviour_logprobs, logprobs),
        }
        if ppo.whiten_advantages and self.algorithm.needs_critic:
            advantages = tk.whiten(advantages)
        train = TrainBatch(
            rollouts=batch,
            old_logprobs=old,
            ref_logprobs=ref,
            values=values,
            advantages=advantages,
            returns=returns,
            importance_weights=self._importance_weights(old, batch.behaviour_logprobs),
        )
        return train, {name: float(value) for name, value in metrics.items()}

    def _importance_weights(self, old: Tensor, behaviour: Tensor) -> Tensor:
        """min(pi_old / pi_behaviour, cap) of rollouts that may be stale (truncated importance sampling), else ones [A]."""
        if not self.config.rollout.staleness:
            return torch.ones_like(old)
        return (old - behaviour).exp().clamp(max=self.config.ppo.importance_cap)

    def _evaluate(self, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(policy log-probs [A], values [A], reference log-probs [A], final values [B]) of a whole batch, on the CPU."""
        temperature = self.config.rollout.temperature
        logprobs, values, reference = (torch.zeros(batch.num_actions) for _ in range(3))
        final_values = torch.zeros(batch.num_sequences)
        budget = self.config.ppo.microbatch_tokens
        for sequences in packing.microbatches(batch, range(batch.num_sequences), budget):
            part, rows = packing.select(batch, sequences)
            part = part.to(self.device)
            out = self.model(part, temperature=temperature)
            logprobs[rows], values[rows] = out.logprobs.cpu(), out.values.cpu()
            final_values[sequences] = out.final_values.cpu()
            if self.reference is not None:
                states = self.reference.hidden(part)[part.state_index]
                reference[rows] = self.reference.logprobs(states, part.actions, temperature)[0].cpu()
        return logprobs, values, reference, final_values

    # ---------------------------------------------------------------- update

    def update(self, batch: TrainBatch) -> Metrics:
        """Epochs x minibatches of optimizer steps; returns the step's metrics, averaged over its actions.

        Each minibatch's gradient is that of ONE big batch: microbatch losses are sums, divided by the minibatch's action
        count.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; no weight was changed by that optimizer step.
        """
        ppo = self.config.ppo
        train_policy = self.step >= ppo.value_warmup_steps
        totals: defaultdict[str, float] = defaultdict(float)
        norms: list[tuple[float, float]] = []
        epochs_done = 0
        for epoch in range(ppo.epochs):
            before = dict(totals)
            for sequences in self._minibatches(batch.rollouts.num_sequences, epoch):
                sums = self._accumulate_gradient(batch, sequences, train_policy)
                norms.append(self._optimizer_step(sums, train_policy))
                for name, value in sums.items():
                    totals[name] += value
            epochs_done += 1
            if ppo.target_kl is not None and _approx_kl(totals, before) > ppo.target_kl:
                break
        self.step += 1
        metrics = self._summary(totals)
        metrics["ppo/epochs_done"] = epochs_done
        metrics["ppo/grad_norm"] = sum(n[0] for n in norms) / len(norms)
        if self.algorithm.needs_critic:
            metrics["ppo/critic_grad_norm"] = sum(n[1] for n in norms) / len(norms)
        metrics["ppo/lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["ppo/kl_coef"] = self.kl.coefficient
        to_reference = (batch.old_logprobs - batch.ref_logprobs).mean()
        self.kl.observe(float(to_reference), batch.rollouts.num_sequences)
        return metrics

    def _minibatches(self, num_sequences: int, epoch: int) -> Iterator[list[int]]:
        """Shuffled prompts, in ``minibatches`` nearly equal parts; the responses of one prompt stay together."""
        n = self.config.rollout.samples_per_prompt
        n = n if num_sequences % n == 0 else 1
        shuffle = seeding.generator(self.config.seed, "minibatches", self.step, epoch)
        order = torch.randperm(num_sequences // n, generator=shuffle)
        for part in order.tensor_split(min(self.config.ppo.minibatches, len(order))):
            yield [p * n + i for p in part.tolist() for i in range(n)]

    def _accumulate_gradient(self, batch: TrainBatch, sequences: list[int], train_policy: bool) -> dict[str, float]:
        """Backward through one minibatch, microbatch by microbatch; returns its summed metrics."""
        ppo = self.loss_config
        self.optimizer.zero_grad(set_to_none=True)
        cu_actions = batch.rollouts.cu_actions.tolist()
        count = sum(cu_actions[b + 1] - cu_actions[b] for b in sequences)
        sums: defaultdict[str, Tensor | float] = defaultdict(float)
        groups = packing.microbatches(batch.rollouts, sequences, ppo.microbatch_tokens)
        for group in groups:
            part = packing.to_device(packing.select_train(batch, group), self.device)
            evaluation = self.model(
                part.rollouts, temperature=self.config.rollout.temperature, train_policy=train_policy
            )
            out = self.loss(evaluation, part, ppo, self.kl.coefficient, train_policy)
            if not isinstance(out, LossOutput):
                raise UserError(f"ppo.loss = {ppo.loss!r} returned a {type(out).__name__}: it must return a LossOutput")
            (out.loss / count).backward()
            for name, value in {**out.metrics, "loss": out.loss.detach()}.items():
                sums[name] = sums[name] + value
        return {**{name: float(value) for name, value in sums.items()}, "actions": count, "microbatches": len(groups)}

    def _optimizer_step(self, sums: dict[str, float], train_policy: bool) -> tuple[float, float]:
        """Clip and step; returns the gradient norms of policy and critic before clipping."""
        norms = [float(nn.utils.clip_grad_norm_(group, self.config.ppo.max_grad_norm)) for group in self._groups]
        if not all(torch.isfinite(torch.tensor([sums["loss"], *norms]))):
            raise TrainingDiverged(self._divergence_report(sums, norms))
        if not train_policy:
            for parameter in self._groups[0]:
                parameter.grad = None
        self.optimizer.step()
        self.scheduler.step()
        return norms[0], norms[1]

    def _divergence_report(self, sums: dict[str, float], norms: list[float]) -> dict[str, Any]:
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": self.step + 1,
            "grad_norm": norms[0],
            "critic_grad_norm": norms[1],
            "summed_metrics": sums,
            "parameters_with_bad_gradients": bad,
            "kl_coef": self.kl.coefficient,
        }

    def _summary(self, totals: dict[str, float]) -> Metrics:
        actions = totals["actions"]
        skip = {"actions", "microbatches", "ratio_sq", "loss"}
        means = {name: value / actions for name, value in totals.items() if name not in skip}
        metrics = {name if (name := f"ppo/{key}") in GLOSSARY else f"custom/{key}": mean for key, mean in means.items()}
        metrics["ppo/ess"] = totals["ratio"] ** 2 / (actions * totals["ratio_sq"]) if totals.get("ratio_sq") else 1.0
        metrics["ppo/microbatches"] = totals["microbatches"]
        return metrics

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """The small JSON part of the state; tensors live in the model and the optimizer."""
        return {"step": self.step, "kl_coef": self.kl.coefficient, "scheduler": self.scheduler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.kl.coefficient = state["step"], state["kl_coef"]
        self.scheduler.load_state_dict(state["scheduler"])


def _critic_metrics(values: Tensor, returns: Tensor) -> dict[str, Tensor]:
    """How well the critic knew its targets before the update."""
    residual = (returns - values).var(correction=0) / returns.var(correction=0).clamp_min(1e-8)
    return {
        "ppo/return_mean": returns.mean(),
        "ppo/value_mean": values.mean(),
        "ppo/explained_variance": 1.0 - residual,
    }


def _approx_kl(totals: dict[str, float], before: dict[str, float]) -> float:
    """The mean approx_kl of the last pass."""
    if "approx_kl" not in totals:
        raise UserError("ppo.target_kl is set, but ppo.loss reports no approx_kl: report it, or remove ppo.target_kl")
    actions = totals["actions"] - before.get("actions", 0.0)
    return (totals["approx_kl"] - before.get("approx_kl", 0.0)) / actions
