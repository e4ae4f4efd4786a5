"""From rollouts to one reward per token: the swap point, and what every source's rewards go through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from tppo_fast.config import RewardConfig
from tppo_fast.data_types import Rollout
from tppo_fast.errors import ProcessFailed, UserError
from tppo_fast.plugins import load_object, raised
from tppo_fast.rewards.alignment import project, rollout_spans
from tppo_fast.rewards.copies import Copies, find_copies
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, SEPARATOR, Labeller, Labels, Span
from tppo_fast.rewards.length_penalty import lwp
from tppo_fast.rewards.lexical import LexicalLabeller
from tppo_fast.rewards.output import checked_items, checked_labels, checked_numbers, checked_probabilities
from tppo_fast.rewards.segment import segment
from tppo_fast.rewards.transfer import spread
from tppo_fast.rewards.values import (
    SCALES,
    ClassProbabilities,
    gap,
    on_spans,
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
        ClassProbabilities of its tokens, sampled or otherwise.

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

        source = model_source.build(config, device, separator)
    elif ":" not in config.source:
        raise UserError(f'reward.source = {config.source!r}: write "lexical", "model", or module:function for your own')
    else:
        source = load_object(config.source, "reward.source")
    return TokenRewards(source=source, config=config, tokenizer=tokenizer, expected_length=length, separator=separator)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRewards:
    """Rollouts -> per-token rewards, in this order: source, copies, scale, share of its word, coefficient, length penalty,
    placement."""

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
        judged = checked_labels(items, rollouts, name) or checked_probabilities(items, rollouts, name)
        if judged:
            pairs = [self._judged(j, r, i) for i, (j, r) in enumerate(zip(judged, rollouts, strict=True))]
            arrays, classes = [values for values, _ in pairs], [kinds for _, kinds in pairs]
            scalar = self.config.placement == "sentence"
        else:
            (arrays, scalar), classes = self._numbers(items, rollouts), None
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        wanted = self.config.length_penalty
        penalised = not scalar and (classes is not None if wanted is None else wanted)
        penalty = self._penalty(max(lengths, default=0), penalised)
        rewards = [self._placed(a, n, penalty) for a, n in zip(arrays, lengths, strict=True)]
        return rewards, classes

    def _judged(self, given: Labels | ClassProbabilities, rollout: Rollout, index: int) -> tuple[np.ndarray, list[int]]:
        """What each token of a response earns before any factor (0-d: what the whole response does), and its class."""
        config, text = self.config, rollout.text
        tokens = rollout_spans(self.tokenizer, rollout, index)
        units = tokens if config.per == "token" else _words(given, text, self.separator)
        copies = find_copies(rollout, tokens, units, self.separator) if config.reject_copies else Copies([], [])
        whole = config.placement == "sentence"
        if isinstance(given, Labels):
            classes = _irrelevant(project(given, units), copies.words)
            paid = _whole(given, classes, copies) if whole else np.array(classes, dtype=np.int64)
            values = np.array(SCALES[config.scale])[paid]
        else:
            scores = given if given.spans is not None else replace(given, spans=tokens)
            scores = scores if scores.spans is units else on_spans(scores, units, text)
            scores = without_relevance(scores, copies.words)
            classes, value = scores.classes, sentence_value if whole else token_values
            values = value(scores, config).numpy()
        if config.per == "word":
            classes = project(Labels(spans=units, classes=classes, sentence=0), tokens)
            values = values if whole else spread(values, units, tokens, text)
        if not whole:
            values[copies.ends] -= gap(config)
        return values, classes

    def _numbers(self, items: list[Any], rollouts: Sequence[Rollout]) -> tuple[list[np.ndarray], bool]:
        """The numbers of a source that does not judge, and whether they are one per response."""
        name, config = self.config.source, self.config
        for wanted, setting, off in (
            (config.reject_copies, "reward.reject_copies", "turn it off"),
            (config.per == "word", 'reward.per = "word"', 'set it to "token"'),
        ):
            if wanted and rollouts:
                raise UserError(
                    f"{setting} needs labels or class probabilities, and reward {name!r} gives numbers: {off}"
                )
        arrays, scalar = checked_numbers(items, rollouts, name)
        if config.placement == "sentence" and not scalar:
            raise UserError(
                f"reward {name!r} gives numbers for tokens, and a sentence score is asked for: return one number per "
                'response or Labels, or use algorithm = "control", which sums the tokens'
            )
        return arrays, scalar

    def _ask(self, rollouts: Sequence[Rollout]) -> Any:
        try:
            return self.source(tuple(rollouts))
        except (ProcessFailed, UserError):
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


def _words(given: Labels | ClassProbabilities, text: str, separator: str) -> list[Span]:
    """The words of a response: those that were labelled, or else those that a labeller would see."""
    if isinstance(given, Labels):
        return given.spans
    return [span for spans in segment(text, separator).words for span in spans]


def _whole(labels: Labels, classes: list[int], copies: Copies) -> int:
    """The class of the whole response: irrelevant where most of its words, or of their tokens, stand in copies."""
    words = sum(kind != SEPARATOR for kind in classes)
    copied = sum(classes[i] != SEPARATOR for i in copies.words)
    return IRRELEVANT if 2 * copied > words else IRRELEVANT + labels.sentence


def _irrelevant(classes: list[int], judged: Sequence[int]) -> list[int]:
    """The classes with relevant turned into irrelevant at these places."""
    rejected = {i for i in judged if classes[i] == RELEVANT}
    return [IRRELEVANT if i in rejected else kind for i, kind in enumerate(classes)]
