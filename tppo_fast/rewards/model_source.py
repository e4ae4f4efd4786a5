"""``reward.source = "model"``: a frozen token reward model scores the rollouts, in large batches, each content once a step.

Nothing is remembered from step to step: a score's last bits depend on what it was scored with, and a resumed run must find
those that the run it continues would have.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from rich.markup import escape

from tppo_fast.config import RewardConfig
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.hashing import user_hash
from tppo_fast.progress import say
from tppo_fast.rewards.token_model import TRAINING_USERS, TokenModel, load
from tppo_fast.rewards.values import ClassProbabilities

Content = tuple[tuple[str, ...], str]
"""History and response."""


class ModelReward:
    """A ``RewardFunction`` whose scores are ``ClassProbabilities`` of the model's own tokens, which may not be the policy's."""

    def __init__(self, model: TokenModel, *, token_budget: int) -> None:
        self._model = model
        self._budget = token_budget
        self.scored = 0  # responses that the model had to read

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[ClassProbabilities]:
        return self.score([(tuple(r.prompt.history), r.text) for r in rollouts])

    def score(self, contents: Sequence[Content]) -> list[ClassProbabilities]:
        """Of each content; those that come twice are read once."""
        scores = self._scores(list(dict.fromkeys(contents)))
        return [scores[content] for content in contents]

    def _scores(self, new: Sequence[Content]) -> dict[Content, ClassProbabilities]:
        if not new:
            return {}
        inputs = self._model.reader([history for history, _ in new], [text for _, text in new])
        probabilities = self._model.probabilities(inputs, self._budget)
        self.scored += len(new)
        scored = zip(new, probabilities, inputs, strict=True)
        return {content: ClassProbabilities(values=p, spans=e.spans) for content, p, e in scored}


def build(config: RewardConfig, device: torch.device | str, separator: str) -> ModelReward:
    """The source of ``reward.model`` on ``reward.device`` (auto: the trainer's, ``device``).

    Raises:
        UserError: no model is given or it cannot be loaded; it knows another separator of queries; the device is missing; "red"
            with a model of hindsight.
    """
    if not config.model:
        raise UserError('reward.source = "model" needs reward.model: the folder that tppo-fast reward-model wrote')
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError('reward.device = "cuda", but torch sees no CUDA device: use "auto" or "cpu"')
    where = device if config.device == "auto" else config.device
    model, _ = load(config.model, where, trust_remote_code=config.trust_remote_code)
    if model.reader.separator.strip() != separator.strip():
        raise UserError(
            f"data.separator = {separator!r}, but the reward model in {config.model!r} was trained with "
            f"{model.reader.separator!r}: use the same"
        )
    if config.value == "red" and model.hindsight:
        raise UserError(
            'reward.value = "red" scores prefixes, and this reward model sees later tokens: train one on a causal '
            'backbone, or use "soft"'
        )
    return ModelReward(model, token_budget=config.batch_tokens)


def warn_of_known_users(config: RewardConfig, users: Collection[str]) -> None:
    """Say how many of the held-out ``users`` the reward model was trained on; nothing where its run's list is not beside it."""
    listed = Path(config.model).resolve().parent / TRAINING_USERS
    if config.source != "model" or not listed.is_file():
        return
    trained_on, distinct = set(listed.read_text().split()), set(users)
    if known := sum(user_hash(user) in trained_on for user in distinct):
        say(
            f"[yellow]reward.model = {escape(repr(config.model))} was trained on {known} of the {len(distinct)} held-out users, "
            "so their evaluation is not independent of the reward: keep those who judge the policy in a file of their own "
            "(data.eval), apart from what is labelled[/]",
            soft_wrap=True,
        )
