"""How good a reward model is on held-out users, beside two baselines; every figure with its interval over users.

All figures are written for weighted users, as ``estimates.bootstrap_users`` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tppo_fast.estimates import Estimate, bootstrap_users

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

METRICS = ("accuracy", "macro_f1", "auc", "calibration_error", "sentence_auc")
"""Defined in ``metrics.GLOSSARY`` under ``reward_model/``."""
BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Labels and class probabilities of B responses of U users, K tokens in all."""

    probabilities: Float[np.ndarray, "K 3"]
    labels: Int[np.ndarray, " K"]
    sentence: Int[np.ndarray, " B"]
    """The sentence labels."""
    response: Int[np.ndarray, " K"]
    """The response each token belongs to."""
    user: Int[np.ndarray, " B"]
    """The user each response belongs to, 0 to U - 1."""

    @property
    def relevance(self) -> Float[np.ndarray, " K"]:
        """P(relevant) among relevant and irrelevant, 0.5 where both are 0."""
        one, two = self.probabilities[:, 1], self.probabilities[:, 2]
        both = one + two
        return np.where(both > 0.0, two / np.where(both > 0.0, both, 1.0), 0.5)

    @property
    def words(self) -> Bool[np.ndarray, " K"]:
        """True where a token belongs to a word: class 1 or 2."""
        return self.labels > 0

    def sentence_scores(self) -> Float[np.ndarray, " B"]:
        """What ``reward.placement = "sentence"`` pays by: ``sum_t sum_c c P_t(c) / sum_t (1 - P_t(0))`` of each response.

        No label is used; 0 where nothing is like a word. To 9 digits, so that equal stays equal.
        """
        count = len(self.sentence)
        soft = np.bincount(self.response, weights=self.probabilities @ np.arange(3.0), minlength=count)
        words = np.bincount(self.response, weights=1.0 - self.probabilities[:, 0], minlength=count)
        return np.round(np.where(words > 1e-6, soft / np.maximum(words, 1e-6), 0.0), 9)


def majority(scored: Scored, class_counts: Int[np.ndarray, "3"]) -> Scored:
    """The baseline that gives every token the training tokens' class frequencies."""
    share = class_counts / class_counts.sum()
    return _replaced(scored, np.tile(share, (len(scored.labels), 1)))


def copy_of_history(scored: Scored, copied: Int[np.ndarray, " K"]) -> Scored:
    """The baseline that calls a word relevant when it stands in the history, and knows the separators."""
    return _replaced(scored, np.eye(3)[copied])


def _replaced(scored: Scored, probabilities: Float[np.ndarray, "K 3"]) -> Scored:
    return Scored(
        probabilities=probabilities,
        labels=scored.labels,
        sentence=scored.sentence,
        response=scored.response,
        user=scored.user,
    )


def measure(scored: Scored, *, seed: int = 0, resamples: int = 1000) -> dict[str, Estimate]:
    """Every metric with its interval over users; NaN where a metric is not defined.

    The same ``seed`` draws the same users for every model that is measured on the same responses.
    """
    return bootstrap_users(_Statistics(scored), int(scored.user.max()) + 1, seed=seed, resamples=resamples)


class _Statistics:
    """What the metrics need, summed per user where they are sums, sorted once where they are ranks."""

    def __init__(self, scored: Scored) -> None:
        users = int(scored.user.max()) + 1
        owner = scored.user[scored.response]  # [K]
        confusion = np.zeros((users, 3, 3))
        np.add.at(confusion, (owner, scored.labels, scored.probabilities.argmax(1)), 1.0)
        words, relevance = scored.words, scored.relevance
        bins = np.minimum((relevance[words] * BINS).astype(int), BINS - 1)
        calibration = np.zeros((users, BINS, 3))  # tokens, confidence, relevant
        entries = np.stack([np.ones(words.sum()), relevance[words], scored.labels[words] == 2], axis=1)
        np.add.at(calibration, (owner[words], bins), entries)
        self._confusion, self._calibration = confusion, calibration
        self._token_auc = _AUC(relevance[words], scored.labels[words] == 2, owner[words])
        self._sentence_auc = _AUC(scored.sentence_scores(), scored.sentence == 1, scored.user)

    def __call__(self, weights: Float[np.ndarray, " U"]) -> dict[str, float]:
        confusion = np.tensordot(weights, self._confusion, 1)  # [label, predicted]
        tokens, confidence, relevant = np.tensordot(weights, self._calibration, 1).T
        hits, labelled, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        f1 = 2.0 * hits[labelled > 0] / (labelled + predicted)[labelled > 0]
        total, words = confusion.sum(), tokens.sum()
        return {
            "accuracy": float(hits.sum() / total) if total else np.nan,
            "macro_f1": float(f1.mean()) if len(f1) else np.nan,
            "auc": self._token_auc(weights),
            "calibration_error": float(np.abs(confidence - relevant).sum() / words) if words else np.nan,
            "sentence_auc": self._sentence_auc(weights),
        }


class _AUC:
    """Area under the ROC curve for any weights of the users; ties count one half (Mann and Whitney's U)."""

    def __init__(
        self, scores: Float[np.ndarray, " K"], positive: Bool[np.ndarray, " K"], owner: Int[np.ndarray, " K"]
    ) -> None:
        _, self._rank = np.unique(scores, return_inverse=True)
        self._positive, self._owner = positive, owner

    def __call__(self, weights: Float[np.ndarray, " U"]) -> float:
        each = weights[self._owner]
        up = np.bincount(self._rank, weights=each * self._positive)
        down = np.bincount(self._rank, weights=each * ~self._positive)
        pairs = up.sum() * down.sum()
        below = np.cumsum(down) - 0.5 * down
        return float(up @ below / pairs) if pairs > 0.0 else np.nan


def reliability(scored: Scored) -> list[tuple[float, float, int]]:
    """(mean confidence, share relevant, tokens) of each bin that holds a word's token."""
    words = scored.words
    confidence, relevant = scored.relevance[words], scored.labels[words] == 2
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    kept = [bins == b for b in range(BINS) if (bins == b).any()]
    return [(float(confidence[k].mean()), float(relevant[k].mean()), int(k.sum())) for k in kept]


def user_numbers(user_ids: Sequence[str]) -> Int[np.ndarray, " B"]:
    """0 to U - 1 in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(user, len(numbers)) for user in user_ids], dtype=np.int64)
