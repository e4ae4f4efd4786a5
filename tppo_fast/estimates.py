"""A figure with its interval over users, and the bootstrap of a statistic of weighted users."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

    Statistics = Callable[[Float[np.ndarray, " U"]], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

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


def cell(value: Estimate | None, interval: bool) -> str:
    """One cell of a table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if interval else f"{value.mean:.3f}"


def bootstrap_users(statistics: Statistics, users: int, *, seed: int, resamples: int) -> dict[str, Estimate]:
    """Every statistic with its percentile interval; NaN ends where too few users or resamples define it.

    A resample draws users with replacement, with all that is theirs: it is the data in which user u counts ``weights[u]``
    times. Equal seeds draw the same users.

    Args:
        statistics: the weight of each user -> name -> value, NaN where one is not defined.
        users: how many there are.
        seed: of the resampling.
        resamples: how many.
    """
    rng = np.random.default_rng(seed)
    share = np.full(users, 1.0 / users)
    drawn = [statistics(rng.multinomial(users, share).astype(float)) for _ in range(resamples)]
    out = {}
    for name, value in statistics(np.ones(users)).items():
        sample = np.array([d[name] for d in drawn])
        sample = sample[np.isfinite(sample)]
        enough = users > 1 and len(sample) > 0
        low, high = np.quantile(sample, (0.025, 0.975)) if enough else (np.nan, np.nan)
        out[name] = Estimate(mean=value, low=float(low), high=float(high), users=users)
    return out
