"""From rollouts to one reward per token: the swap point, and what every source's rewards go through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from tppo_fast.config import RewardConfig
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.plugins import load_object, raised
from tppo_fast.rewards.alignment import project, rollout_spans
from tppo_fast.rewards.copies import Copies, find_copies
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, SEPARATOR, Labeller, Labels
from tppo_fast.rewards.length_penalty import lwp
from tppo_fast.rewards.lexical import LexicalLabeller
from tppo_fast.rewards.output import checked_items, checked_labels, checked_numbers, checked_probabilities
from tppo_fast.rewards.values import (
    SCALES,
    ClassProbabilities,
    gap,
    sentence_value,
    token_values,
    without_relevance,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Numbers = Sequence[float] | Sequence[Sequence[float]] | Sequence[Tensor] | Tensor | np.ndarray
    Rewards = Numbers | Sequence[Labels] | Sequence[ClassProbabilities]


class RewardFunction(Protocol):
    """Scores responses; any callable will do."""

    def __call__(self, rollouts: Sequence[Rollout], /) -> Rewards:
        """For every rollout a float (lands on the last token), or its [length] rewards, the Labels of its words, or the
        ClassProbabilities of its tokens.

        One kind for the whole batch. Labels are aligned to tokens and scaled by ``reward.scale``; class probabilities are
        valued by ``reward.value``.
        """
        ...


def label_with(labeller: Labeller) -> RewardFunction:
    """The reward function that labels each response's words; wrap your own labeller in it for ``reward.source``."""

    def label(rollouts: Sequence[Rollout], /) -> list[Labels]:
        return [labeller(r.prompt.history, r.prompt.next_queries, r.text) for r in rollouts]

    return label


def build_reward(
    config: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    expected_length: float,
    separator: str,
    num_queries: int | None = None,
    device: torch.device | str = "cpu",
) -> TokenRewards:
    """The reward of a run.

    Args:
        config: the ``reward`` section; its ``expected_length`` wins over the argument when it is set.
        tokenizer: the policy's, with which responses were decoded.
        expected_length: sl of the length penalty, in tokens, measured on the training sessions.
        separator: text between the queries of a response.
        num_queries: how many queries a response should hold; the lexical labeller calls later ones irrelevant.
        device: where a reward model scores when ``reward.device`` is auto.

    Raises:
        UserError: a source that cannot be loaded, or an expected length that is not a number of tokens.
    """
    length = expected_length if config.expected_length is None else config.expected_length
    if config.length_penalty is not False and not (math.isfinite(length) and length >= 0.0):
        raise UserError(f"reward.expected_length = {length}: give a number of tokens, 0 or more")
    if config.source == "lexical":
        source: RewardFunction = label_with(LexicalLabeller(separator=separator, num_queries=num_queries))
    elif config.source == "model":
        from tppo_fast.rewards import model_source  # needs transformers

        source = model_source.build(config, tokenizer, device, separator)
    elif ":" not in config.source:
        raise UserError(f'reward.source = {config.source!r}: write "lexical", "model", or module:function for your own')
    else:
        source = load_object(config.source, "reward.source")
    return TokenRewards(source=source, config=config, tokenizer=tokenizer, expected_length=length, separator=separator)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRewards:
    """Rollouts -> per-token rewards, in this order: source, copies, scale, coefficient, length penalty, placement."""

    source: RewardFunction
    """Who scores."""
    config: RewardConfig
    """Scale, coefficient, length penalty and placement."""
    tokenizer: PreTrainedTokenizerBase
    """Decodes the responses, to align word labels with tokens."""
    expected_length: float
    """sl of the length penalty, in tokens."""
    separator: str = ", "
    """Text between the queries of a response, to find copies by."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Float[Tensor, " length"]]:
        """One fp32 tensor per rollout: the reward FOR each of its tokens, before any KL penalty.

        Raises:
            UserError: the source failed or returned something else than it should.
        """
        return self.explain(rollouts)[0]

    def explain(self, rollouts: Sequence[Rollout]) -> tuple[list[Float[Tensor, " length"]], list[list[int]] | None]:
        """The rewards, and class 0, 1 or 2 of every token, or None where the source gives numbers instead of labels."""
        name = self.config.source
        items = checked_items(self._ask(rollouts), rollouts, name)
        scalar, classes, copies = False, None, [Copies([], []) for _ in rollouts]
        sentence = self.config.placement == "sentence"
        labels = checked_labels(items, rollouts, name)
        reject = self.config.reject_copies
        spans = [rollout_spans(self.tokenizer, r, i) for i, r in enumerate(rollouts)] if labels or reject else []
        if reject:
            copies = [find_copies(r, own, self.separator) for r, own in zip(rollouts, spans, strict=True)]
        if labels:
            classes = [project(*pair) for pair in zip(labels, spans, strict=True)]
            classes = [_irrelevant(c, found.words) for c, found in zip(classes, copies, strict=True)]
            table, scalar = np.array(SCALES[self.config.scale]), sentence
            wholes = [_whole(*one) for one in zip(labels, classes, copies, strict=True)]
            indices = wholes if sentence else classes
            arrays = [table[np.array(c, dtype=np.int64)] for c in indices]
        elif scores := checked_probabilities(items, rollouts, name):
            if reject:
                scores = [without_relevance(s, found.words) for s, found in zip(scores, copies, strict=True)]
            classes, scalar = [s.classes for s in scores], sentence
            value = sentence_value if sentence else token_values
            arrays = [value(s, self.config).numpy() for s in scores]
        elif reject and rollouts:
            raise UserError(
                f"reward.reject_copies needs labels or class probabilities, and reward {name!r} gives numbers: turn it off"
            )
        else:
            arrays, scalar = checked_numbers(items, rollouts, name)
            if sentence and not scalar:
                raise UserError(
                    f"reward {name!r} gives numbers for tokens, and a sentence score is asked for: return one number per "
                    'response or Labels, or use algorithm = "control", which sums the tokens'
                )
        if not scalar:
            for array, found in zip(arrays, copies, strict=True):
                array[found.ends] -= gap(self.config)
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        wanted = self.config.length_penalty
        penalised = not scalar and (classes is not None if wanted is None else wanted)
        penalty = self._penalty(max(lengths, default=0), penalised)
        rewards = [self._placed(a, n, penalty) for a, n in zip(arrays, lengths, strict=True)]
        return rewards, classes

    def _ask(self, rollouts: Sequence[Rollout]) -> Any:
        try:
            return self.source(rollouts)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward {self.config.source!r} failed with {raised(error)}") from error

    def _penalty(self, longest: int, penalised: bool) -> np.ndarray:
        """[longest] factors: the coefficient, times lwp where length is penalised."""
        factors = np.full(longest, self.config.coefficient)
        if penalised:
            positions = torch.arange(1, longest + 1)
            factors *= lwp(positions, self.expected_length, self.config.length_alpha).numpy()
        return factors

    def _placed(self, values: np.ndarray, length: int, factors: np.ndarray) -> Float[Tensor, " length"]:
        """One reward per token; a scalar (0-d), or the sum where placement is "last", stands on the last token."""
        scaled = values * factors[:length] if values.ndim else values * self.config.coefficient
        if values.ndim and self.config.placement == "token":
            return torch.from_numpy(scaled).float()
        rewards = torch.zeros(length)
        rewards[-1] = float(scaled.sum())
        return rewards


def _whole(labels: Labels, classes: list[int], copies: Copies) -> int:
    """The class of the whole response: irrelevant where most of its words' tokens stand in copies."""
    words = sum(kind != SEPARATOR for kind in classes)
    copied = sum(classes[i] != SEPARATOR for i in copies.words)
    return IRRELEVANT if 2 * copied > words else IRRELEVANT + labels.sentence


def _irrelevant(classes: list[int], tokens: Sequence[int]) -> list[int]:
    """The classes with these tokens' relevant turned into irrelevant."""
    rejected = {i for i in tokens if classes[i] == RELEVANT}
    return [IRRELEVANT if i in rejected else kind for i, kind in enumerate(classes)]
