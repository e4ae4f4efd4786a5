"""The metrics by hand-computed numbers, and intervals whose coverage is checked against known spreads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tppo_fast import evaluate
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError
from tppo_fast.estimates import Difference, Estimate, bootstrap_users, few_users, holm
from tppo_fast.evaluate import copy_last, paired_difference, score, score_queries, summarise


def prompt(
    history: Sequence[str] = ("rome",), truth: Sequence[str] = ("rome hotels", "rome map"), relevant: Sequence[str] = ()
) -> Prompt:
    return Prompt(token_ids=[1], user_id="u", history=history, next_queries=truth, relevant_queries=[*truth, *relevant])


def one(queries: Sequence[str], given: Prompt | None = None, num_queries: int = 3) -> dict[str, float]:
    return score_queries(given or prompt(), queries, num_queries=num_queries)


def test_every_metric_of_one_response() -> None:
    given = prompt(relevant=["rome museums"])
    # rome(history) | Rome Museums!(relevant) | rome map(true): words 1 / 2 1 / 2 2 by the lexical rules
    assert one(["rome", "Rome Museums!", "rome map"], given) == {
        "relevance": pytest.approx(2 / 3),
        "hit": 1.0,
        "hit_1": 0.0,
        "mrr": pytest.approx(1 / 3),
        "exact": pytest.approx(1 / 3),
        "word_relevance": pytest.approx(3 / 5),
        "distinct": 1.0,
        "distinct_1": pytest.approx(3 / 5),
        "distinct_2": 1.0,
        "valid": 1.0,
        "copy": pytest.approx(1 / 3),
    }


def test_relevance_asks_for_novelty_and_no_repetition() -> None:
    assert one(["rome map", "Rome  MAP", "rome map"])["relevance"] == pytest.approx(1 / 3)
    returning = prompt(history=["rome map"], truth=["rome map"])
    assert one(["rome map"] * 3, returning)["relevance"] == 0.0
    assert one(["rome map"] * 3, returning)["copy"] == 1.0


def test_queries_past_the_slots_do_not_count() -> None:
    late = one(["a", "b", "c", "rome map"])
    assert (late["relevance"], late["hit"], late["mrr"], late["valid"]) == (0.0, 0.0, 0.0, 0.0)
    assert late["exact"] == 0.25


def test_too_few_and_blank_queries() -> None:
    assert one(["rome map", " ", "?!"])["valid"] == 0.0
    assert one(["rome map", " ", "rome hotels", "x"])["valid"] == 1.0
    empty = one([])
    assert set(empty.values()) == {0.0}


def test_distinct_pairs_stay_within_queries() -> None:
    scores = one(["a b", "b a", "a b"])
    assert scores["distinct"] == pytest.approx(2 / 3)
    assert scores["distinct_1"] == pytest.approx(2 / 6)
    assert scores["distinct_2"] == pytest.approx(2 / 3)


def test_score_of_rollouts_parses_and_counts_tokens() -> None:
    def rollout(text: str, length: int, finish: str) -> Rollout:
        return Rollout(
            prompt=prompt(),
            token_ids=[1] * length,
            logprobs=[0.0] * length,
            text=text,
            finish_reason=finish,  # type: ignore[arg-type]
            policy_version=0,
        )

    scores = score([rollout("rome map;x", 4, "stop"), rollout("x", 9, "length")], lambda t: t.split(";"), num_queries=2)
    assert list(scores) == list(evaluate.METRICS)
    assert scores["relevance"].tolist() == [0.5, 0.0]
    assert scores["length"].tolist() == [4.0, 9.0]
    assert scores["truncated"].tolist() == [0.0, 1.0]
    assert scores["valid"].tolist() == [1.0, 0.0]


def test_the_copy_last_row_is_valid_and_worthless() -> None:
    scores = copy_last([prompt(), prompt(history=["pasta", "rome map"])], num_queries=3)
    assert set(evaluate.METRICS) - set(scores) == {"length", "truncated"}
    assert scores["valid"].tolist() == [1.0, 1.0]
    assert scores["copy"].tolist() == [1.0, 1.0]
    assert scores["relevance"].tolist() == [0.0, 0.0]
    assert scores["hit"].tolist() == [0.0, 1.0]  # the second user really asked it again
    assert copy_last([prompt(history=[])], num_queries=3)["valid"].tolist() == [0.0]


@settings(deadline=None)
@given(
    queries=st.lists(st.sampled_from(["rome", "rome map", "rome hotels", "x", "", "a b"]), max_size=6),
    n=st.integers(1, 4),
)
def test_every_metric_is_a_share(queries: list[str], n: int) -> None:
    scores = one(queries, num_queries=n)
    assert all(0.0 <= value <= 1.0 for value in scores.values())
    assert scores["relevance"] <= scores["hit"]  # every relevant query here is a true next query
    assert scores["mrr"] <= scores["hit"]


def test_zero_slots_are_refused() -> None:
    with pytest.raises(UserError, match="num_queries = 0"):
        one([], num_queries=0)


def users(count: int) -> list[str]:
    return [f"user {i}" for i in range(count)]


def test_the_interval_of_independent_users_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(size=400)
    estimate = summarise({"m": values}, users(400))["m"]
    half = 1.96 * values.std() / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.users == 400
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_responses_of_one_user_are_resampled_together() -> None:
    """Ten identical responses per user carry the information of one."""
    values = np.random.default_rng(1).normal(size=100)
    single = summarise({"m": values}, users(100))["m"]
    repeated = summarise({"m": np.repeat(values, 10)}, np.repeat(users(100), 10).tolist())["m"]
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    assert repeated.users == single.users == 100
    naive = summarise({"m": np.repeat(values, 10)}, users(1000))["m"]
    assert naive.high - naive.low < 0.4 * (repeated.high - repeated.low)


def test_the_mean_is_over_responses_when_users_differ_in_size() -> None:
    """Without the one user 1, without the other 0: an error of 0.5, and Student's t of two users is wide."""
    estimate = summarise({"m": np.array([1.0, 1.0, 1.0, 0.0])}, ["a", "a", "a", "b"])["m"]
    assert estimate.mean == 0.75
    half = 0.5 * stats.t.ppf(0.975, 1)
    assert (estimate.low, estimate.high) == pytest.approx((0.75 - half, 0.75 + half))


def test_equal_seeds_give_equal_intervals() -> None:
    values = np.random.default_rng(2).random(50) ** 20  # so skewed that the resamples reach beyond Student's t
    first, again, other = (summarise({"m": values}, users(50), seed=seed)["m"] for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("runs", [1, 3])
def test_no_spread_gives_an_interval_of_one_point(runs: int) -> None:
    estimate = summarise({"m": np.full((runs, 5), 0.1)}, users(5))["m"]
    assert estimate.low == estimate.high == pytest.approx(0.1)


@pytest.mark.parametrize("values", [[0.0, 1.0], [[0.0, 1.0], [1.0, 1.0]], [2.0, 2.0]])
def test_one_user_has_no_known_interval(values: list) -> None:
    estimate = summarise({"m": np.array(values)}, ["a", "a"])["m"]
    assert np.isnan(estimate.low)
    assert np.isnan(estimate.high)
    assert estimate.mean == np.mean(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], r"m has shape \[1, 1\] for 2 users"),
        ([], "shape"),
        ([1.0, float("nan")], "m holds nan"),
    ],
)
def test_bad_input_is_named(values: list[float], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        summarise({"m": np.array(values)}, users(2))


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(5)
    difficulty = rng.normal(size=200)
    a, b = difficulty + 0.1 + 0.05 * rng.normal(size=200), difficulty
    gap = paired_difference(a, b, users(200))
    assert gap.mean == pytest.approx((a - b).mean())
    assert 0.08 < gap.low < 0.1 < gap.high < 0.12
    unpaired = summarise({"a": a}, users(200))["a"]
    assert unpaired.high - unpaired.low > 10 * (gap.high - gap.low)


def test_the_difference_is_antisymmetric_and_zero_against_itself() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.random((3, 40)), rng.random((3, 40))
    forth, back = paired_difference(a, b, users(40)), paired_difference(b, a, users(40))
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low))
    same = paired_difference(a, a, users(40))
    assert same.mean == same.low == same.high == 0.0


def test_several_runs_widen_the_interval_by_their_own_spread() -> None:
    """Runs that differ by a constant: the users' spread is tiny, and Student's t knows how few the runs are."""
    noise = 0.01 * np.random.default_rng(7).normal(size=(4, 100))
    a = noise + np.array([[-1.0], [0.0], [1.0], [2.0]])
    gap = paired_difference(a, np.zeros_like(a), users(100))
    assert gap.mean == pytest.approx(0.5, abs=0.01)
    half = stats.t.ppf(0.975, 3) * np.sqrt(5 / 3) / 2  # of -1, 0, 1, 2
    assert (gap.low, gap.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.02)
    alone = paired_difference(a[1], np.zeros(100), users(100))
    assert alone.high - alone.low < 0.01


def test_unpaired_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"a has shape \[2\] and b \[3\]"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], users(2))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    covered = 0
    for trial in range(200):
        user_level = rng.normal(size=(40, 1))
        values = (user_level + rng.normal(size=(40, 2))).ravel()
        names = np.repeat(users(40), 2).tolist()
        estimate = summarise({"m": values}, names, seed=trial, resamples=300)["m"]
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.98


def test_the_interval_over_few_users_covers_a_difference_as_often_as_it_says() -> None:
    """The percentiles alone cover 88 % here, at 6 users."""
    rng = np.random.default_rng(9)
    covered = 0
    for trial in range(400):
        gap = rng.normal(size=6).repeat(2)
        estimate = summarise({"m": gap}, np.repeat(users(6), 2).tolist(), seed=trial, resamples=200)["m"]
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.93 <= covered / 400 <= 0.98


@pytest.mark.parametrize("runs", [1, 3])
def test_a_p_value_is_below_005_where_the_interval_leaves_zero_out(runs: int) -> None:
    rng = np.random.default_rng(10)
    shown = 0
    for trial in range(60):
        a = rng.normal(0.4, 1.0, (runs, 30)) + rng.normal(0.0, 0.1, (runs, 1))
        gap = paired_difference(a, np.zeros_like(a), users(30), seed=trial)
        shown += gap.p < 0.05
        assert (gap.p < 0.05) == (gap.low > 0.0 or gap.high < 0.0) or abs(gap.p - 0.05) < 0.002
    assert 10 < shown < 60  # both cases occurred


def test_p_values_by_hand() -> None:
    runs = np.array([[1.0], [2.0], [4.0]]).repeat(50, 1)
    gap = paired_difference(runs, np.zeros_like(runs), users(50))
    assert gap.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 4.0], 0.0)[1])
    ones = {count: paired_difference([1.0] * count, [0.0] * count, users(count)).p for count in (2, 5, 6, 20)}
    assert ones == {2: 0.5, 5: 0.0625, 6: 0.03125, 20: 1 / evaluate.RESAMPLES}  # coins, and no smaller than a resample
    assert paired_difference([1.0, 1.0], [1.0, 1.0], users(2)).p == 1.0
    assert np.isnan(paired_difference([1.0], [0.0], users(1)).p)


def test_holms_correction_by_hand() -> None:
    family = [Difference(mean=1.0, p=p) for p in (0.03, 0.01, np.nan, 0.5, 0.02)]
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.5 x 1: never below the one before
    assert [each.p for each in holm(family)] == pytest.approx([0.06, 0.04, np.nan, 0.5, 0.06], nan_ok=True)
    assert [each.p for each in holm([Difference(mean=1.0, p=0.7)] * 2)] == [1.0, 1.0]
    assert holm([]) == []


def test_a_bootstrap_of_few_weighted_users_is_as_wide_as_students_t() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])

    def figures(weights: np.ndarray) -> dict[str, float]:
        return {"mean": float(weights @ values / weights.sum()), "of the last": 5.0 if weights[3] else np.nan}

    found = bootstrap_users(figures, 4, seed=0, resamples=300)
    half = stats.t.ppf(0.975, 3) * stats.sem(values)
    assert (found["mean"].low, found["mean"].high) == pytest.approx((4.0 - half, 4.0 + half))
    assert (found["of the last"].low, found["of the last"].high) == (5.0, 5.0)


def test_few_users_are_said_to_be_few() -> None:
    table = {"a": {"hit": Estimate(mean=0.1, users=40)}, "b": {"hit": Estimate(mean=0.1, users=12)}}
    assert few_users(table).startswith("12 users are few")
    assert few_users({"a": table["a"], "guess": {"hit": Estimate(mean=0.1)}}) == ""
    assert few_users({}) == ""
