"""A figure with its interval over users, how sure a difference is, and the bootstrap of a statistic of weighted users.

A bootstrap of few units is too narrow, so an interval here is never narrower than Student's t makes it of the same units
(dev/LOG.md, 2026-11-27, has the coverage of both).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from jaxtyping import Float

    Statistics = Callable[[Float[np.ndarray, " U"]], dict[str, float]]

FEW_USERS = 30
"""Below this many, even the wider intervals of rare events cover less than they say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval."""

    mean: float
    """The mean over responses (and seeds), or another statistic of them."""
    low: float = math.nan
    """Lower end; NaN with fewer than two users, whose spread nobody can know."""
    high: float = math.nan
    """Upper end; NaN as ``low``."""
    users: int = 0
    """Resampled units: distinct users."""

    def __format__(self, spec: str) -> str:
        """The figure and the ends of its interval, each by ``spec``: 0.412 [0.380, 0.440] by ``.3f``."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference(Estimate):
    """A difference, and how sure it is."""

    p: float = math.nan
    """Two-sided p-value of its being 0, of the same kind as the interval; ``holm`` corrects it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What is known of how far a figure would be off in other data."""

    mean: float
    drawn: Float[np.ndarray, " n"]
    """The figure in each resample; empty with fewer than two users."""
    errors: Sequence[tuple[float, int]]
    """Standard errors of Student's kind, each with the number of units (users, or runs) it was taken over."""
    users: int

    def estimate(self) -> Estimate:
        low, high = self.ends()
        return Estimate(mean=self.mean, low=low, high=high, users=self.users)

    def difference(self) -> Difference:
        low, high = self.ends()
        return Difference(mean=self.mean, low=low, high=high, users=self.users, p=self.p())

    def ends(self) -> tuple[float, float]:
        """The percentile interval of 95 %, at least as wide as Student's t makes it of any of ``errors``.

        Of very few units an end may lie beyond what a share can be: they tell that little.
        """
        if not len(self.drawn):
            return math.nan, math.nan
        low, high = map(float, np.quantile(self.drawn, (0.025, 0.975)))
        for error, units in self.errors:
            half = float(stats.t.ppf(0.975, units - 1)) * error
            low, high = min(low, self.mean - half), max(high, self.mean + half)
        return low, high

    def p(self) -> float:
        """The largest p-value of the same: of the resamples' percentiles (no smaller than one of them) and of each error.

        Never below 2 * 0.5**users, the chance that as many fair coins agree: differences that are all equal show no spread to
        take an error from.
        """
        if not len(self.drawn):
            return math.nan
        beyond = 2 * min((self.drawn <= 0.0).sum(), (self.drawn >= 0.0).sum())
        found = [min(max(beyond, 1) / len(self.drawn), 1.0), min(2 * 0.5**self.users, 1.0)]
        found += [2 * stats.t.sf(abs(self.mean) / e, units - 1) for e, units in self.errors if e > 0.0]
        return float(max(found))


def holm(family: Sequence[Difference]) -> list[Difference]:
    """The same comparisons with their p-values corrected for being several (Holm 1979's step-down; NaN does not count).

    The chance that any of them below 0.05 is of no difference is then at most 5 %.
    """
    known = sorted((i for i, each in enumerate(family) if not math.isnan(each.p)), key=lambda i: family[i].p)
    corrected, largest = list(family), 0.0
    for done, i in enumerate(known):
        largest = max(largest, min(1.0, family[i].p * (len(known) - done)))
        corrected[i] = replace(family[i], p=largest)
    return corrected


def jackknife_error(left_out: Float[np.ndarray, " U"]) -> float:
    """The standard error of a figure from its values with each user left out in turn (robust to users of unequal size)."""
    users = len(left_out)
    return math.sqrt((users - 1) / users * float(((left_out - left_out.mean()) ** 2).sum()))


def few_users(table: Mapping[str, Mapping[str, Estimate]]) -> str:
    """A sentence of warning where an interval rests on fewer than ``FEW_USERS`` users, otherwise empty."""
    least = min((e.users for row in table.values() for e in row.values() if e.users), default=FEW_USERS)
    if least >= FEW_USERS:
        return ""
    return f"{least} users are few: of rare events, such as a hit, these intervals cover less than 95 %."


def cell(value: Estimate | None, interval: bool) -> str:
    """One cell of a table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if interval else f"{value.mean:.3f}"


def bootstrap_users(statistics: Statistics, users: int, *, seed: int, resamples: int) -> dict[str, Estimate]:
    """Every statistic with its interval; NaN ends where too few users or resamples define it.

    A resample draws users with replacement, with all that is theirs: it is the data in which user u counts ``weights[u]``
    times. Equal seeds draw the same users. The interval is at least as wide as Student's t makes it of the jackknife's error.

    Args:
        statistics: the weight of each user -> name -> value, NaN where one is not defined.
        users: how many there are.
        seed: of the resampling.
        resamples: how many.
    """
    rng = np.random.default_rng(seed)
    share = np.full(users, 1.0 / users)
    drawn = [statistics(rng.multinomial(users, share).astype(float)) for _ in range(resamples)] if users > 1 else []
    left_out = [statistics(weights) for weights in 1.0 - np.eye(users)] if users > 1 else []
    out = {}
    for name, value in statistics(np.ones(users)).items():
        sample, without = (np.array([d[name] for d in side]) for side in (drawn, left_out))
        sample, without = sample[np.isfinite(sample)], without[np.isfinite(without)]
        errors = [(jackknife_error(without), len(without))] if len(without) > 1 else []
        out[name] = Spread(mean=value, drawn=sample, errors=errors, users=users).estimate()
    return out
