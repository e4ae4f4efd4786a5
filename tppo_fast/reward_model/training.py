"""The training loop of the token reward model: one optimizer step at a time, resumable exactly, stopped early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import get_scheduler

from tppo_fast import checkpoint, seeding
from tppo_fast.atomic import atomic_folder
from tppo_fast.data.rows import searched
from tppo_fast.errors import TrainingDiverged
from tppo_fast.interrupt import InterruptGuard
from tppo_fast.metrics import MetricsLogger
from tppo_fast.progress import Progress
from tppo_fast.reward_model.data import Example
from tppo_fast.reward_model.losses import balanced, class_weights, global_loss, local_loss
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rewards.token_model import TokenModel, batches

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
"""Of the best model so far, and of a checkpoint."""


class Learner:
    """Model, optimizer and counters. ``step`` counts optimizer steps; randomness depends on (seed, step) alone."""

    def __init__(self, config: RewardModelConfig, model: TokenModel, examples: Sequence[Example]) -> None:
        self.config, self.model, self.examples = config, model, examples
        self.step = 0
        self.best_loss, self.best_step, self.looks_without_gain = float("inf"), -1, 0
        self.labels = torch.cat([e.labels for e in examples])
        self.counts = self.labels.bincount(minlength=3)
        equal = config.loss.class_weights == "equal"
        self.weights = (torch.ones(3) if equal else class_weights(self.counts)).to(model.device)
        self.steps_per_epoch = -(-len(examples) // config.train.batch_size)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.peak_lr, betas=(0.9, 0.98), weight_decay=config.train.weight_decay
        )
        warmup = round(config.train.warmup_share * self.total_steps)
        self.scheduler = get_scheduler("linear", self.optimizer, warmup, self.total_steps)
        self._pass: tuple[int, list[int], list[Tensor]] = (-1, [], [])  # epoch, order, valid tokens of each example

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps or self.looks_without_gain >= self.config.train.patience

    def _batch(self) -> list[int]:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._pass[0] != epoch:
            order = self._order(seeding.generator(self.config.seed, "order", epoch))
            draw = seeding.generator(self.config.seed, "mask", epoch)
            keep = balanced(self.labels, self.config.loss.max_ratio, draw)
            valid = list(keep.split([len(e.labels) for e in self.examples]))
            self._pass = (epoch, order, valid)
        size = self.config.train.batch_size
        return self._pass[1][place * size : (place + 1) * size]

    def _order(self, generator: torch.Generator) -> list[int]:
        """Responses in random order; packed, sessions in random order with the responses to each one after the other.

        A packed backbone then reads each history once. One that reads it for every response anyway learns more from a batch
        of unrelated ones.
        """
        if not self.model.packed:
            return torch.randperm(len(self.examples), generator=generator).tolist()
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, example in enumerate(self.examples):
            groups.setdefault((example.row.user_id, *searched(example.row.history)), []).append(i)
        together = list(groups.values())
        return [i for g in torch.randperm(len(together), generator=generator).tolist() for i in together[g]]

    def learn(self) -> dict[str, float]:
        """One optimizer step; returns its losses and gradient norm.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; the weights were left as they were.
        """
        chosen = self._batch()
        torch.manual_seed(seeding.derive(self.config.seed, "dropout", self.step))
        self.model.classifier.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses([self.examples[i] for i in chosen], [self._pass[2][i] for i in chosen], backward=True)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm))
        values = {**losses, "grad_norm": norm}
        if not all(map(math.isfinite, values.values())):
            raise TrainingDiverged({"step": self.step + 1, **values}, "train.lr")
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return {f"reward_model/{name}": value for name, value in values.items()}

    @torch.no_grad()
    def validate(self, examples: Sequence[Example]) -> float:
        """The loss over examples whose every token is valid, without dropout."""
        self.model.classifier.eval()
        everything = [torch.ones(len(e.labels), dtype=torch.bool) for e in examples]
        return self._losses(examples, everything, backward=False)["loss"]

    def _losses(self, examples: Sequence[Example], valid: Sequence[Tensor], *, backward: bool) -> dict[str, float]:
        """L, L_local and L_global of all examples together, in microbatches whose gradients add up to the whole one's."""
        settings, device = self.config.loss, self.model.device
        tokens, responses = max(sum(int(v.sum()) for v in valid), 1), len(examples)
        inputs = [e.encoded for e in examples]
        sums = {"local_loss": 0.0, "global_loss": 0.0}
        for group in batches(inputs, self.config.train.microbatch_tokens, padded=not self.model.packed):
            logits = self.model.logits([inputs[i] for i in group])
            labels = torch.cat([examples[i].labels for i in group]).to(device)
            mask = torch.cat([valid[i] for i in group]).to(device)
            lengths = torch.tensor([len(examples[i].labels) for i in group])
            owner = torch.arange(len(group)).repeat_interleave(lengths).to(device)
            sentence = torch.tensor([examples[i].row.labels.sentence for i in group], device=device)
            local = local_loss(logits, labels, mask, self.weights) / tokens
            whole = global_loss(logits, labels, mask, owner, sentence) / responses
            if backward:
                (settings.local_weight * local + settings.global_weight * whole).backward()
            sums["local_loss"] += float(local.detach())
            sums["global_loss"] += float(whole.detach())
        total = settings.local_weight * sums["local_loss"] + settings.global_weight * sums["global_loss"]
        return {"loss": total, **sums}

    # ------------------------------------------------------------------------------------------ state on disk

    def save(self) -> Path:
        """Write a checkpoint, see ``checkpoint.write``; it replaces the one before."""

        def fill(folder: Path) -> dict[str, Any]:
            save_model(self.model.classifier, str(folder / WEIGHTS))
            best = {"loss": self.best_loss, "step": self.best_step, "looks_without_gain": self.looks_without_gain}
            return {"step": self.step, "best": best, "scheduler": self.scheduler.state_dict()}

        written = checkpoint.write(self.config.run_dir, self.step, fill, self.optimizer, self.config, keep=1)
        checkpoint.drop_best(self.config.run_dir, self.best_step)
        return written

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint that ``save`` wrote.

        Raises:
            UserError: it is damaged or belongs to another model.
        """
        with checkpoint.reading(folder, self.optimizer) as state:
            load_model(self.model.classifier, folder / WEIGHTS)
            self.scheduler.load_state_dict(state["scheduler"])
            self.step = state["step"]
            best = state["best"]
            self.best_loss, self.best_step = best["loss"], best["step"]
            self.looks_without_gain = best["looks_without_gain"]

    def keep_if_best(self, loss: float) -> None:
        """Count a look at the validation users; the best weights so far go to ``run_dir``.

        Raises:
            TrainingDiverged: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise TrainingDiverged({"step": self.step, "validation_loss": loss}, "train.lr")
        if loss < self.best_loss:
            with atomic_folder(checkpoint.best_of(self.config.run_dir, self.step)) as temporary:
                save_model(self.model.classifier, str(temporary / WEIGHTS))
            self.best_loss, self.best_step, self.looks_without_gain = loss, self.step, 0
            checkpoint.drop_best(self.config.run_dir, self.step)
        else:
            self.looks_without_gain += 1

    def take_best(self) -> None:
        """Put the best weights in place."""
        load_model(self.model.classifier, checkpoint.best_of(self.config.run_dir, self.best_step) / WEIGHTS)


def fit(learner: Learner, validation: Sequence[Example], logger: MetricsLogger, guard: InterruptGuard) -> None:
    """Train until the passes are done or the validation loss stops falling; the best weights are in place then.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP; the caller saves.
        TrainingDiverged: a loss or gradient is not finite.
    """
    settings = learner.config.train
    look_every = settings.eval_every or learner.steps_per_epoch
    with Progress("reward model", learner.total_steps, "step", start=learner.step) as progress:
        while not learner.finished:
            guard.check()
            metrics = learner.learn()
            if learner.step % look_every == 0 or learner.step == learner.total_steps:
                loss = learner.validate(validation)
                learner.keep_if_best(loss)
                metrics["reward_model/validation_loss"] = loss
            logger.log(learner.step, metrics)
            progress.update(1, loss=metrics["reward_model/loss"], best_validation=learner.best_loss)
            if settings.save_every and learner.step % settings.save_every == 0:
                learner.save()
    learner.save()
    guard.check()
    learner.take_best()
