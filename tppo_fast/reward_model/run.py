"""``tppo-fast reward-model``: labels in, a measured reward model out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tppo_fast import preflight, seeding
from tppo_fast.atomic import atomic_folder, write_atomic
from tppo_fast.data.rows import searched
from tppo_fast.errors import UserError
from tppo_fast.estimates import Estimate
from tppo_fast.hashing import sha256_of, user_hash
from tppo_fast.labelling.records import LabelledResponse, read_labels, read_record
from tppo_fast.metrics import MetricsLogger
from tppo_fast.reward_model import backbone, card, quality
from tppo_fast.reward_model.data import Example, encode, split
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.reward_model.training import Learner, fit
from tppo_fast.rewards.token_model import TRAINING_USERS, TokenModel
from tppo_fast.run_dir import REWARD_MODEL, open_run_dir
from tppo_fast.runs import resolve_device, stoppable
from tppo_fast.sections import Settings, given


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelResult:
    """What a finished training leaves behind."""

    folder: Path
    """The reward model: weights, tokenizer, record and card, no text of any user."""
    verdict: str
    """Whether it beats the baselines, in one sentence."""
    table: dict[str, dict[str, Estimate]]
    """Reward model and baselines -> metric -> estimate, on the test users."""


def train_reward_model(config: RewardModelConfig | Settings, *, resume: bool = False) -> RewardModelResult:
    """Train a token reward model on labelled responses and leave it in ``config.run_dir / "model"``.

    Beside that folder stand ``report.html``, with responses of test users, and ``TRAINING_USERS``, by which a policy's run finds
    out whether the model knows its held-out users.

    Args:
        config: every setting, or a nested dict or the path of a TOML file of them; see ``tppo_fast.reward_model.settings``.
        resume: continue the newest checkpoint of ``run_dir``, bit for bit as if it had never stopped.

    Raises:
        UserError: bad settings, labels or backbone, before any expensive work.
        TrainingDiverged: a loss or gradient is not finite; a report is in ``run_dir`` and earlier checkpoints stay.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint of the last finished step was saved.
    """
    config = given(config, RewardModelConfig)
    preflight.check(config, resume, REWARD_MODEL)
    with seeding.restored(), open_run_dir(config, resume, REWARD_MODEL) as start_from:
        return _train(config, start_from)


def _train(config: RewardModelConfig, start_from: Path | None) -> RewardModelResult:
    if config.threads:
        torch.set_num_threads(config.threads)
    rows, data_hash = read_labels(config.data.labels), sha256_of(Path(config.data.labels))
    parts = split(rows, config.data, config.seed)
    model = backbone.build(config, _texts(parts.train), resolve_device(config.device))
    train, validation, test = (encode(part, model.reader) for part in (parts.train, parts.validation, parts.test))
    _check_words(train, validation, test)
    learner = Learner(config, model, train)
    if start_from is not None:
        learner.load(start_from)
    _learn(learner, validation)
    facts = {
        "labels_sha256": data_hash,
        "labelling": read_record(config.data.labels),
        "labeller": sorted({row.labeller for row in rows}),
        "counts": {"train": len(train), "validation": len(validation), "test": len(test)},
        "class_counts": learner.counts.tolist(),
        "step": learner.step,
        "best_step": learner.best_step,
    }
    users = sorted({user_hash(row.user_id) for row in parts.train})
    write_atomic(config.run_dir / TRAINING_USERS, "".join(f"{user}\n" for user in users).encode())
    return _finish(config, model, test, learner, facts)


def _learn(learner: Learner, validation: Sequence[Example]) -> None:
    logger = MetricsLogger(
        learner.config.run_dir,
        start_step=learner.step,
        tensorboard=False,
        config=learner.config.model_dump(mode="json"),
    )
    with logger, stoppable(learner.config.run_dir, learner.save) as guard:
        fit(learner, validation, logger, guard)


def _finish(
    config: RewardModelConfig, model: TokenModel, test: Sequence[Example], learner: Learner, facts: dict
) -> RewardModelResult:
    scored = score(model, test, config.train.microbatch_tokens)
    copied = torch.cat([e.copied for e in test]).numpy()
    rivals = {
        card.MODEL: scored,
        "majority": quality.majority(scored, learner.counts.numpy()),
        "copy of the history": quality.copy_of_history(scored, copied),
    }
    table = {name: quality.measure(s, seed=config.seed, resamples=config.resamples) for name, s in rivals.items()}
    folder = config.run_dir / "model"
    result = card.Result(config=config, model=model, test=test, scored=scored, table=table, facts=facts)
    card.write_report(config.run_dir / "report.html", result)
    with atomic_folder(folder) as temporary:
        model.save(temporary)
        card.write(temporary, result)
    return RewardModelResult(folder=folder, verdict=card.verdict(table), table=table)


def score(model: TokenModel, examples: Sequence[Example], token_budget: int) -> quality.Scored:
    """Labels and the model's class probabilities of labelled responses."""
    probabilities = model.probabilities([e.encoded for e in examples], token_budget)
    lengths = [len(e.labels) for e in examples]
    return quality.Scored(
        probabilities=torch.cat(probabilities).double().numpy(),
        labels=torch.cat([e.labels for e in examples]).numpy(),
        sentence=np.array([e.row.labels.sentence for e in examples]),
        response=np.repeat(np.arange(len(examples)), lengths),
        user=quality.user_numbers([e.row.user_id for e in examples]),
    )


def _texts(rows: Sequence[LabelledResponse]) -> list[str]:
    """What a tokenizer made from nothing is trained on."""
    return [" " + text.strip() for row in rows for text in (*searched(row.history), row.response)]


def _check_words(*parts: Sequence[Example]) -> None:
    for name, examples in zip(("training", "validation", "test"), parts, strict=True):
        if not any((e.labels > 0).any() for e in examples):
            raise UserError(f"data.labels: the {name} users have no response with a labelled word; label more of them")
