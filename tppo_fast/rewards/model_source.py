"""``reward.source = "model"``: a frozen token reward model scores the rollouts, in large batches, each content once a step.

Nothing is remembered from step to step: a score's last bits depend on what it was scored with, and a resumed run must find
those that the run it continues would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tppo_fast.config import RewardConfig
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.rewards.token_model import TokenModel, load
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
        contents = [(tuple(r.prompt.history), r.text) for r in rollouts]
        scores = self._scores(dict.fromkeys(contents))
        return [scores[content] for content in contents]

    def _scores(self, contents: Iterable[Content]) -> dict[Content, ClassProbabilities]:
        new = list(contents)
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
    model, _ = load(config.model, device if config.device == "auto" else config.device)
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
