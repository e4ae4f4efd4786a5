"""How good responses are: per-response metrics against the true next queries, and intervals over users.

A query counts as another one when their ``normalise_query`` forms are equal. Only the first ``num_queries`` generated
queries fill slots. Two guards against the known trap, a policy that repeats the user's last query: ``relevance`` asks
for novelty, and ``copy_last`` gives the row of that baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from scipy import stats

from tppo_fast.data.relevance import relevance
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError
from tppo_fast.estimates import Difference, Estimate, Spread, jackknife_error
from tppo_fast.rewards.labels import RELEVANT
from tppo_fast.rewards.lexical import classify_queries
from tppo_fast.words import normalise_query

METRICS: dict[str, str] = {
    "relevance": "Share of the num_queries slots filled with a relevant, unrepeated query that is not in the history.",
    "hit": "1 when any of the first num_queries queries is a true next query.",
    "hit_1": "1 when the first query is a true next query.",
    "mrr": "1 / rank of the first true next query among the first num_queries queries, 0 without one.",
    "exact": "Share of the generated queries that equal a true next query.",
    "word_relevance": "Share of the generated words that the lexical labeller calls relevant, 0 without words.",
    "distinct": "Share of distinct queries among the generated queries, 0 without queries.",
    "distinct_1": "Share of distinct words among the generated words, 0 without words.",
    "distinct_2": "Share of distinct pairs of adjacent words within queries among all such pairs, 0 without pairs.",
    "valid": "1 when the response holds exactly num_queries queries.",
    "copy": "Share of the generated queries that stand in the history, 0 without queries.",
    "length": "Sampled tokens of the response, the end-of-sequence token included.",
    "truncated": "1 when the response was cut at the length limit.",
}
"""Every per-response metric in one sentence."""

Parse = Callable[[str], Sequence[str]]
Scores = dict[str, np.ndarray]
"""Metric name -> fp64 [B], one number per response."""
RESAMPLES = 2000
"""Of a bootstrap."""


def score(rollouts: Sequence[Rollout], parse: Parse, *, num_queries: int) -> Scores:
    """Every metric of every response.

    Args:
        rollouts: the responses.
        parse: response text -> generated queries in order.
        num_queries: how many queries a response should hold.
    """
    rows = [
        score_queries(rollout.prompt, parse(rollout.text), num_queries=num_queries)
        | {"length": float(len(rollout.token_ids)), "truncated": float(rollout.finish_reason == "length")}
        for rollout in rollouts
    ]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in METRICS}


def held_out(rollouts: Sequence[Rollout], parse: Parse, *, num_queries: int, seed: int) -> dict[str, float]:
    """What a run logs of one evaluation: the mean of every metric under ``eval/``, and relevance with its interval."""
    scores = score(rollouts, parse, num_queries=num_queries)
    users = [rollout.prompt.user_id for rollout in rollouts]
    relevance = summarise({"relevance": scores["relevance"]}, users, seed=seed)["relevance"]
    return {
        **{f"eval/{name}": float(values.mean()) for name, values in scores.items()},
        "eval/relevance_low": relevance.low,
        "eval/relevance_high": relevance.high,
    }


def copy_last(prompts: Sequence[Prompt], *, num_queries: int) -> Scores:
    """The scores of repeating the user's last query ``num_queries`` times; nothing is sampled, so no token metrics."""
    rows = [score_queries(p, list(p.history[-1:]) * num_queries, num_queries=num_queries) for p in prompts]
    names = [name for name in METRICS if name not in ("length", "truncated")]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}


def score_queries(prompt: Prompt, queries: Sequence[str], *, num_queries: int) -> dict[str, float]:
    """The metrics of one list of generated queries: all but the token metrics."""
    if num_queries < 1:
        raise UserError(f"num_queries = {num_queries}: ask for at least one query")
    forms = [form for form in map(normalise_query, queries) if form]
    history = {normalise_query(query) for query in prompt.history}
    truth = {normalise_query(query) for query in prompt.next_queries}
    slots = forms[:num_queries]
    rank = next((rank for rank, form in enumerate(slots, start=1) if form in truth), None)
    classes = [c for query in classify_queries(prompt.history, prompt.next_queries, queries) for c in query]
    words = [form.split() for form in forms]
    return {
        "relevance": relevance(
            slots, relevant=prompt.relevant_queries, history=prompt.history, num_queries=num_queries
        ),
        "hit": float(rank is not None),
        "hit_1": float(rank == 1),
        "mrr": 1.0 / rank if rank else 0.0,
        "exact": _share([form in truth for form in forms]),
        "word_relevance": _share([c == RELEVANT for c in classes]),
        "distinct": _distinct(forms),
        "distinct_1": _distinct([word for query in words for word in query]),
        "distinct_2": _distinct([pair for query in words for pair in pairwise(query)]),
        "valid": float(len(forms) == num_queries),
        "copy": _share([form in history for form in forms]),
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def _distinct(items: Sequence[object]) -> float:
    return len(set(items)) / len(items) if items else 0.0


def summarise(
    scores: Scores, users: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """Mean and bootstrap interval of every metric; users are resampled whole, with all their responses.

    The interval is at least as wide as Student's t makes it of the users, and of the runs' means where there are several: a
    bootstrap of few units is too narrow (of 5 runs whose spread outweighs the users', it covers 80 % instead of 95 %).

    Args:
        scores: name -> [B], or [R, B] from R runs that differ in their seed (runs are then resampled too).
        users: who each of the B responses belongs to.
        seed: of the resampling; equal input gives equal output.
        resamples: bootstrap resamples.

    Raises:
        UserError: a metric without one finite number per response.
    """
    spreads = {name: _spread(name, values, users, seed=seed, resamples=resamples) for name, values in scores.items()}
    return {name: spread.estimate() for name, spread in spreads.items()}


def paired_difference(
    a: np.ndarray | Sequence[float] | Sequence[Sequence[float]],
    b: np.ndarray | Sequence[float] | Sequence[Sequence[float]],
    users: Sequence[str],
    *,
    seed: int = 0,
) -> Difference:
    """mean(a) - mean(b) with its paired bootstrap interval: both sides share every resample.

    Args:
        a: [B] numbers, response i of both sides answering the same prompt; or [R, B], run r of both sides sharing
            seed r. Over several runs, runs and users are resampled independently (the bootstrap of crossed factors,
            Owen 2007, "The pigeonhole bootstrap"), so the interval covers another seed as well as another user; it is
            widened as in ``summarise``.
        b: the other side, of the same shape.
        users: who each of the B responses belongs to.
        seed: of the resampling.

    Raises:
        UserError: unequal shapes, or no finite numbers.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise UserError(f"a has shape {list(left.shape)} and b {list(right.shape)}: pair every response")
    return _spread("a - b", left - right, users, seed=seed, resamples=RESAMPLES).difference()


def _spread(name: str, values: np.ndarray, users: Sequence[str], *, seed: int, resamples: int) -> Spread:
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))  # [R, B]
    _check(name, values, users)
    _, owner = np.unique(np.asarray(users), return_inverse=True)  # [B]
    counts = np.bincount(owner)  # [U]
    sums = np.stack([np.bincount(owner, weights=run) for run in values])  # [R, U]
    mean = float(values.mean())
    if len(counts) < 2:
        return Spread(mean=mean, drawn=np.empty(0), errors=(), users=len(counts))
    if np.ptp(values) == 0.0:  # every resample is the same
        return Spread(mean=mean, drawn=np.full(resamples, mean), errors=(), users=len(counts))
    total = sums.mean(0)
    errors = [(jackknife_error((total.sum() - total) / (counts.sum() - counts)), len(counts))]
    if len(values) > 1:
        errors.append((float(stats.sem(values.mean(1))), len(values)))
    drawn = _resampled(sums, counts, seed=seed, resamples=resamples)
    return Spread(mean=mean, drawn=drawn, errors=errors, users=len(counts))


def _resampled(sums: np.ndarray, counts: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """The mean over responses in each resample; one run resamples users, several resample runs too."""
    runs, users = sums.shape

    def mean(drawn_users: np.ndarray, drawn_runs: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
        chosen = np.zeros((1,), dtype=np.int64) if drawn_runs is None else drawn_runs
        total = sums[chosen[..., :, None], drawn_users[..., None, :]].sum((-2, -1))
        return total / (chosen.shape[axis] * counts[drawn_users].sum(axis))

    return stats.bootstrap(
        (np.arange(users),) if runs == 1 else (np.arange(users), np.arange(runs)),
        mean,
        vectorized=True,
        axis=-1,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // sums.size),  # bounds the memory of a batch of resamples
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution


def _check(name: str, values: np.ndarray, users: Sequence[str]) -> None:
    if values.ndim != 2 or not values.size or values.shape[1] != len(users):
        raise UserError(f"{name} has shape {list(values.shape)} for {len(users)} users: give one number per response")
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds {values[~np.isfinite(values)][0]}: every response needs a finite number")
