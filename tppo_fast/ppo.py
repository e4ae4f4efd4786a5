"""Token-level PPO on packed rollouts: ``prepare`` (log-probs, values, GAE) and ``update`` (epochs of clipped steps)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import tppo_kernels as tk
from torch import Tensor, nn

from tppo_fast import flops, offload, optimizers, packing, parity, seeding
from tppo_fast.advantages import penalised_rewards
from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.config import Config, PPOConfig
from tppo_fast.data_types import LossOutput, RolloutBatch, TrainBatch, TrainRows, to_device
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.losses import LossFunction, checked, is_row_local
from tppo_fast.metrics import GLOSSARY
from tppo_fast.model import Actor, ActorCritic, Outputs, layout_of
from tppo_fast.team import Team, on_one_device

Metrics = dict[str, float]
STALE_CAP = 2.0
"""``importance_cap`` of rollouts that may be stale, where none is given."""
HEAD_LR = 3e-4
"""Least learning rate of a value head that learns alone: it starts at 0, and returns can be far from there."""


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
        self,
        config: Config,
        model: ActorCritic,
        reference: Actor | None,
        loss: LossFunction,
        *,
        total_steps: int,
        team: Team | None = None,
    ) -> None:
        """``team``: the processes that all call ``prepare`` and ``update`` with the same batch, and share the work."""
        self.config = config
        self.team = team or Team()
        self.algorithm = ALGORITHMS[config.algorithm]
        self.model = model
        self.reference = reference
        self.loss = loss
        self.step = 0
        self.updating = False  # and, when an update failed, for good: some weights are of the next step
        self.kl = KLController(config.ppo)
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)
        ppo = config.ppo
        self.loss_config = ppo if self.algorithm.needs_critic else ppo.model_copy(update={"value_coef": 0.0})
        self._groups = [[p for p in part.parameters() if p.requires_grad] for part in (model.actor, model.critic)]
        critic_lr = (
            max(10 * ppo.lr, HEAD_LR if model.critic.body is None else 0.0) if ppo.critic_lr is None else ppo.critic_lr
        )
        self.optimizer = optimizers.build([(self._groups[0], ppo.lr), (self._groups[1], critic_lr)], ppo)
        self._parked = offload.Parked(self.device)
        self._waiting = offload.unshared([reference, model.critic], model.actor)
        self._counter = flops.Counter(model.actor.lm, model.critic.body, reference=reference is not None)
        each = ppo.epochs * ppo.minibatches
        self.scheduler = optimizers.schedule(
            self.optimizer, ppo.lr_schedule, ppo.lr_warmup_steps, total_steps * each,
            waiting=[ppo.value_warmup_steps * each, 0],
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.model.actor.device

    # ---------------------------------------------------------------- prepare

    @torch.no_grad()
    def prepare(self, batch: RolloutBatch) -> tuple[TrainBatch, Metrics]:
        """Old and reference log-probabilities, values, advantages and returns for a packed batch (on the CPU).

        One pass of each body: policy and reference, and the critic's where it has its own. Everything stays on the device;
        the host waits once, for the metrics.
        """
        ppo = self.config.ppo
        self._counter.reset()
        logprobs, values, ref_logprobs, final_values = self._evaluate(batch)
        on_device = batch.to(self.device)
        behaviour = on_device.behaviour_logprobs
        old = logprobs if ppo.old_logprobs == "recompute" else behaviour
        ref = old if ref_logprobs is None else ref_logprobs
        coefficient = self.kl.coefficient if ppo.kl_placement == "reward" else 0.0
        rewards = penalised_rewards(on_device.rewards, old, ref, coefficient)
        group = self.config.rollout.samples_per_prompt
        advantages, returns = self.algorithm.estimate(rewards, values, final_values, on_device, group, ppo)
        metrics = {
            **({} if self.reference is None else {"ppo/kl": (old - ref).mean()}),
            "ppo/advantage_mean": advantages.mean(),
            "ppo/advantage_std": advantages.std(correction=0),
            **(_critic_metrics(values, returns) if self.algorithm.needs_critic else {}),
            **parity.metrics(behaviour, logprobs),
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
            importance_weights=self._importance_weights(old, behaviour),
        )
        (numbers,) = fetch([metrics])
        self.team.check()
        return train, {**numbers, **self.team.sum_numbers(self._counter.metrics("prepare"), self.device)}

    def _importance_weights(self, old: Tensor, behaviour: Tensor) -> Tensor:
        """min(pi_old / pi_behaviour, cap), truncated importance sampling, where there is a cap; else ones [A]."""
        cap = self.config.ppo.importance_cap
        if cap is None and self.config.rollout.staleness:
            cap = STALE_CAP
        return torch.ones_like(old) if cap is None else (old - behaviour).exp().clamp(max=cap)

    def _evaluate(self, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(policy log-probs [A], values [A], reference log-probs [A], final values [B]) of a whole batch, on the device.

        The microbatches are those of the update's first pass, so that its first ratio is exactly 1.
        """
        temperature = self.config.rollout.temperature
        logprobs, values = (torch.zeros(batch.num_actions, device=self.device) for _ in range(2))
        reference = None if self.reference is None else torch.zeros_like(logprobs)
        final_values = torch.zeros(batch.num_sequences, device=self.device)
        minibatches = self._minibatches(batch.num_sequences, 0)
        planned = (self.team.share(self._microbatches(batch, minibatch)) for minibatch in minibatches)
        for group in (group for groups in planned for group in groups):
            part, rows = packing.select(batch, group)
            part = part.to(self.device)
            rows, sequences = (to_device(x, self.device) for x in (rows, torch.tensor(group)))
            layout = layout_of(part, self.model.actor.config)
            self._counter.prepared(part)
            states, values[rows], final_values[sequences] = self.model.states(part, layout=layout)
            logprobs[rows] = self.model.actor.logprobs(states, part.actions, temperature)[0]
            if self.reference is not None and reference is not None:
                states = self.reference.hidden(part, layout)[part.state_index]
                reference[rows] = self.reference.logprobs(states, part.actions, temperature)[0]
        self.team.sum_(x for x in (logprobs, values, reference, final_values) if x is not None)  # 0 but for one's share
        return logprobs, values, reference, final_values

    # ---------------------------------------------------------------- update

    def update(self, batch: TrainBatch, begins: Callable[[str], None] = lambda _: None) -> Metrics:
        """Epochs x minibatches of optimizer steps; returns the step's metrics, averaged over its actions.

        Each minibatch's gradient is that of ONE big batch: microbatch losses are sums, divided by the minibatch's action
        count. The host never waits for the device until all steps are queued (with ``target_kl``, once before each). From the
        first loss or gradient that is not finite on, the device itself skips every step. ``begins`` is told "1/8" first, ...

        Raises:
            TrainingDiverged: a loss or gradient was not finite; no weight was changed by that optimizer step or a later one.
        """
        ppo = self.config.ppo
        train_policy = self.step >= ppo.value_warmup_steps
        rollouts = batch.rollouts
        planned = [part for epoch in range(ppo.epochs) for part in self._minibatches(rollouts.num_sequences, epoch)]
        found: list[dict[str, Tensor]] = []  # of each minibatch that was read
        microbatches = taken = 0  # taken: optimizer steps
        self.updating = True
        self._bad.zero_()
        self._counter.reset()
        lr = 0.0
        for number, sequences in enumerate(planned, 1):
            begins(f"{number}/{len(planned)}")
            sums, count = self._accumulate_gradient(batch, sequences, train_policy)
            found.append(sums)
            microbatches += count
            if ppo.target_kl is not None and _approx_kl(sums) > ppo.target_kl:
                break
            lr = float(self.optimizer.param_groups[0]["lr"])
            sums |= self._optimizer_step(sums["loss"], train_policy)
            taken += 1
        for _ in range(len(planned) - taken):
            self.scheduler.step()  # the steps that were not taken: the schedule ends with the run
        kl = (batch.old_logprobs - batch.ref_logprobs).mean()
        *rows, last = fetch([*found, {"kl": kl, "spread": self._spread()}])
        self.team.check()
        for sequences, row in zip(planned, rows, strict=False):
            if row.get("bad"):
                raise TrainingDiverged(self._divergence_report(batch, sequences, row, train_policy))
        self.team.check_alike(last["spread"])
        self.optimizer.zero_grad(set_to_none=True)  # or gradients would live through the next rollouts
        self.step += 1
        self.updating = False
        metrics = {**self._summary(rows), **self.team.sum_numbers(self._counter.metrics("update"), self.device)}
        passes, rest = divmod(len(found), len(planned) // ppo.epochs)
        parts = planned[len(found) - rest : len(found)]
        needed = passes * rollouts.num_tokens + sum(packing.select(rollouts, part)[0].num_tokens for part in parts)
        metrics["perf/padding_waste"] = 1.0 - needed / metrics["perf/update_tokens"]
        metrics["ppo/microbatches"] = microbatches
        metrics["ppo/epochs_done"] = ppo.epochs * taken / len(planned)
        metrics["ppo/lr"] = lr
        metrics["ppo/kl_coef"] = self.kl.coefficient
        if train_policy:
            self.kl.observe(last["kl"], rollouts.num_sequences)
        return metrics

    def _spread(self) -> Tensor:
        """How far the processes' weights are apart."""
        return self.team.spread(p for group in self._groups for p in group)

    def meet(self) -> None:
        """Find out whether every process starts from the same weights: ProcessFailed if not."""
        self.team.check_alike(float(self._spread()))

    def _minibatches(self, num_sequences: int, epoch: int) -> Iterator[list[int]]:
        """Shuffled prompts, in ``minibatches`` nearly equal parts; the responses of one prompt stay together."""
        n = self.config.rollout.samples_per_prompt
        n = n if num_sequences % n == 0 else 1
        shuffle = seeding.generator(self.config.seed, "minibatches", self.step, epoch)
        order = torch.randperm(num_sequences // n, generator=shuffle)
        for part in order.tensor_split(min(self.config.ppo.minibatches, len(order))):  # logged rollouts may be fewer
            yield [p * n + i for p in part.tolist() for i in range(n)]

    def _microbatches(self, batch: RolloutBatch, sequences: list[int]) -> list[list[int]]:
        """The sequences in groups that fit a pass, of nearly equal cost."""
        budget = self.config.ppo.microbatch_tokens
        return packing.microbatches(
            batch, sequences, budget, pair_cost=self._counter.pair_cost, multiple_of=self.team.size
        )

    def _accumulate_gradient(
        self, batch: TrainBatch, sequences: list[int], train_policy: bool
    ) -> tuple[dict[str, Tensor], int]:
        """Backward through one minibatch; returns its summed metrics and the number of microbatches."""
        self.optimizer.zero_grad(set_to_none=True)
        cu_actions = batch.rollouts.cu_actions.tolist()
        count = sum(cu_actions[b + 1] - cu_actions[b] for b in sequences)
        sums: dict[str, Tensor] = {}
        groups = self._microbatches(batch.rollouts, sequences)
        for group in self.team.share(groups):
            part = packing.select_train(batch, group)
            self._counter.updated(part.rollouts, train_policy)
            loss, metrics = self._loss(part, count, train_policy)
            if loss.requires_grad:
                loss.backward()
            elif train_policy:  # else a loss without a value term, in value warm-up: there is nothing to learn yet
                raise UserError(
                    f"ppo.loss = {self.config.ppo.loss!r} returned a loss without a gradient: compute it from the evaluation's "
                    "logprobs, entropy or values, without detaching them"
                )
            for name, value in {**metrics, "loss": loss.detach() * count}.items():
                sums[name] = sums[name] + value if name in sums else value
        self.team.sum_gradients(parameter for group in self._groups for parameter in group)
        actions = torch.tensor(float(count), dtype=torch.float64)
        return {"actions": actions, **self.team.sum_scalars(sums)}, len(groups)

    def _loss(self, part: TrainBatch, count: int, train_policy: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """(a microbatch's loss / count, its summed metrics)."""

        def loss(outputs: Outputs, rows: TrainRows) -> LossOutput:
            out = self.loss(outputs, rows, self.loss_config, self.kl.coefficient, train_policy)
            return checked(out, f"ppo.loss = {self.config.ppo.loss!r}")

        options = {"temperature": self.config.rollout.temperature, "train_policy": train_policy}
        if is_row_local(self.loss):
            return self.model.loss_by_rows(part, loss, normalizer=count, **options)
        out = loss(self.model(part.rollouts, **options), part)
        return out.loss / count, out.metrics

    def _optimizer_step(self, loss: Tensor, train_policy: bool) -> dict[str, Tensor]:
        """Clip and step, unless something is or was not finite; returns the norms before clipping and that verdict."""
        limit, none = self.config.ppo.max_grad_norm, torch.zeros_like(loss)
        policy, critic = (nn.utils.clip_grad_norm_(group, limit) if group else none for group in self._groups)
        for value in (loss, policy, critic):
            self._bad.logical_or_(~torch.isfinite(value))
        if not train_policy:
            for parameter in self._groups[0]:
                parameter.grad = None
        if self.team.size > 1 and self.config.ppo.weights == "bfloat16" and not self.config.model.lora_rank:
            # Weights that are rounded at random are rounded alike everywhere.
            torch.manual_seed(seeding.derive(self.config.seed, "rounding", self.scheduler.last_epoch))
        if optimizers.skips_on_device(self.optimizer):
            self.optimizer.found_inf = self._bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(self._bad):
            self.optimizer.step()
        self.scheduler.step()
        return {"grad_norm": policy, "critic_grad_norm": critic, "bad": self._bad.clone()}

    def _divergence_report(
        self, batch: TrainBatch, sequences: list[int], row: dict[str, float], train_policy: bool
    ) -> dict[str, Any]:
        """What went wrong in the first bad step; its gradient is computed again, since no weight has changed after it."""
        self._accumulate_gradient(batch, sequences, train_policy)
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        self.optimizer.zero_grad(set_to_none=True)
        verdict = {name: row.pop(name) for name in ("grad_norm", "critic_grad_norm", "bad")}
        return {
            "step": self.step + 1,
            "grad_norm": verdict["grad_norm"],
            "critic_grad_norm": verdict["critic_grad_norm"],
            "summed_metrics": row,
            "parameters_with_bad_gradients": bad,
            "kl_coef": self.kl.coefficient,
        }

    def _summary(self, rows: list[dict[str, float]]) -> Metrics:
        """The metrics of all optimizer steps: means over actions, norms over steps."""
        totals: defaultdict[str, float] = defaultdict(float)
        for row in rows:
            for name, value in row.items():
                totals[name] += value
        actions = totals["actions"]
        skip = {"actions", "ratio_sq", "loss", "bad", "grad_norm", "critic_grad_norm"}
        if self.reference is None:
            skip.add("kl_loss")  # its other side was the old policy
        means = {name: value / actions for name, value in totals.items() if name not in skip}
        metrics = {name if (name := f"ppo/{key}") in GLOSSARY else f"custom/{key}": mean for key, mean in means.items()}
        if totals.get("ratio_sq") and "ratio" in totals:  # a loss of one's own need not report them
            metrics["ppo/ess"] = totals["ratio"] ** 2 / (actions * totals["ratio_sq"])
        steps = max(sum("bad" in row for row in rows), 1)  # ``target_kl`` may have kept the last from being one
        metrics["ppo/grad_norm"] = totals["grad_norm"] / steps
        if self.algorithm.needs_critic:
            metrics["ppo/critic_grad_norm"] = totals["critic_grad_norm"] / steps
        return metrics

    # ---------------------------------------------------------------- memory

    def park(self) -> None:
        """Move what rollouts do not need to main memory: optimizer states, reference, critic."""
        self._parked.out(self._waiting, self.optimizer)

    def unpark(self) -> None:
        """Undo ``park``; the step's numbers are those of a run that never parked."""
        self._parked.back(self._waiting, self.optimizer)

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """The small JSON part of the state; tensors live in the model and the optimizer."""
        return {
            "step": self.step,
            "kl_coef": self.kl.coefficient,
            "scheduler": optimizers.numbers(self.scheduler.state_dict()),
        }

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


def fetch(rows: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Scalars of the device as numbers: the one place where the loop waits for it, once for all of them."""
    values = iter(on_one_device([value for row in rows for value in row.values()]).tolist())
    return [{name: next(values) for name in row} for row in rows]


def _approx_kl(sums: dict[str, Tensor]) -> float:
    """The mean approx_kl of a minibatch."""
    if "approx_kl" not in sums:
        raise UserError("ppo.target_kl is set, but ppo.loss reports no approx_kl: report it, or remove ppo.target_kl")
    (row,) = fetch([{name: sums[name] for name in ("approx_kl", "actions")}])
    return row["approx_kl"] / row["actions"]
