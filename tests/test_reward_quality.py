"""The reward model's losses by hand, and its metrics against their textbook forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tppo_fast.estimates import Estimate
from tppo_fast.metrics import GLOSSARY
from tppo_fast.reward_config import RewardConfig
from tppo_fast.reward_model import card, quality
from tppo_fast.reward_model.losses import balanced, class_weights, global_loss, local_loss
from tppo_fast.rewards.values import ClassProbabilities, sentence_value

TRUE = torch.ones(4, dtype=torch.bool)


# ---------------------------------------------------------------- losses


def test_local_loss_is_the_weighted_cross_entropy_of_the_valid_tokens() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4]]))
    valid = torch.tensor([True, True, True, False])
    found = local_loss(logits, torch.tensor([0, 2, 1, 1]), valid, torch.tensor([1.0, 2.0, 3.0]))
    assert float(found) == pytest.approx(-(math.log(0.5) + 3.0 * math.log(0.8) + 2.0 * math.log(0.2)), rel=1e-6)


def test_global_loss_compares_mean_soft_values_with_sentence_labels() -> None:
    logits = torch.log(
        torch.tensor([[0.0, 0.5, 0.5], [0.8, 0.1, 0.1], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]).clamp_min(1e-9)
    )
    labels, owner = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 0, 0, 1])
    # response 0: soft values 1.5 and 2 (the separator does not count), label 2; response 1: 1, label 1; response 2 is empty
    found = global_loss(logits, labels, TRUE, owner, torch.tensor([1, 0, 1]))
    assert float(found) == pytest.approx((1.75 - 2.0) ** 2 + 0.0, abs=1e-6)
    masked = global_loss(logits, labels, torch.tensor([True, True, False, True]), owner, torch.tensor([1, 0, 1]))
    assert float(masked) == pytest.approx((1.5 - 2.0) ** 2, abs=1e-6)


def test_class_weights_are_inverse_frequencies_with_mean_one() -> None:
    counts = torch.tensor([10, 30, 60])
    weights = class_weights(counts)
    assert torch.allclose(weights, torch.tensor([100 / 30, 100 / 90, 100 / 180]))
    assert float(weights @ counts.float()) == pytest.approx(100.0)
    assert class_weights(torch.tensor([5, 0, 5])).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("ones", "twos"), [(10, 100), (100, 10), (20, 30), (0, 50), (7, 22)])
def test_the_probability_mask_keeps_the_classes_within_the_ratio(ones: int, twos: int) -> None:
    labels = torch.cat([torch.zeros(5), torch.ones(ones), 2 * torch.ones(twos)]).long()
    keep = balanced(labels, 3.0, torch.Generator().manual_seed(0))
    assert keep[:5].all()  # class 0 stays
    left = [int((labels[keep] == c).sum()) for c in (1, 2)]
    assert min(left) == min(ones, twos)
    assert max(left) == (min(max(ones, twos), 3 * min(ones, twos)) if min(ones, twos) else max(ones, twos))
    assert torch.equal(keep, balanced(labels, 3.0, torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------- metrics


def scored(seed: int = 0, responses: int = 60) -> quality.Scored:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, responses)
    labels = rng.integers(0, 3, lengths.sum())
    noisy = np.eye(3)[labels] + rng.random((len(labels), 3)).round(1)  # rounded: ties occur
    return quality.Scored(
        probabilities=noisy / noisy.sum(1, keepdims=True),
        labels=labels,
        sentence=rng.integers(0, 2, responses),
        response=np.repeat(np.arange(responses), lengths),
        user=np.sort(rng.integers(0, 20, responses)),
    )


def test_metrics_equal_their_textbook_forms() -> None:
    data = scored()
    found = quality.measure(data, resamples=1)
    predicted, labels = data.probabilities.argmax(1), data.labels
    assert found["accuracy"].mean == pytest.approx((predicted == labels).mean())
    f1 = []
    for c in range(3):
        hit, either = ((predicted == c) & (labels == c)).sum(), (predicted == c).sum() + (labels == c).sum()
        f1.append(2 * hit / either)
    assert found["macro_f1"].mean == pytest.approx(np.mean(f1))
    words, relevance = labels > 0, data.relevance
    up, down = relevance[labels == 2], relevance[labels == 1]
    u = stats.mannwhitneyu(up, down).statistic
    assert found["auc"].mean == pytest.approx(u / (len(up) * len(down)))
    sentence = data.sentence_scores()
    each = [torch.tensor(data.probabilities[data.response == i]) for i in range(len(sentence))]
    paid = [float(sentence_value(ClassProbabilities(values=p), RewardConfig(scale="paper"))) for p in each]
    np.testing.assert_allclose(sentence, paid, atol=1e-8)
    u = stats.mannwhitneyu(sentence[data.sentence == 1], sentence[data.sentence == 0]).statistic
    pairs = (data.sentence == 1).sum() * (data.sentence == 0).sum()
    assert found["sentence_auc"].mean == pytest.approx(u / pairs)
    bins = np.minimum((relevance[words] * 10).astype(int), 9)
    gaps = [
        abs(relevance[words][bins == b].mean() - (labels[words] == 2)[bins == b].mean()) * (bins == b).sum()
        for b in range(10)
        if (bins == b).any()
    ]
    assert found["calibration_error"].mean == pytest.approx(sum(gaps) / words.sum())


def test_a_weight_of_two_is_a_user_counted_twice() -> None:
    data = scored()
    again = data.user == 3
    tokens = again[data.response]
    places = np.cumsum(again) - 1 + len(data.sentence)
    doubled = quality.Scored(
        probabilities=np.concatenate([data.probabilities, data.probabilities[tokens]]),
        labels=np.concatenate([data.labels, data.labels[tokens]]),
        sentence=np.concatenate([data.sentence, data.sentence[again]]),
        response=np.concatenate([data.response, places[data.response[tokens]]]),
        user=np.concatenate([data.user, data.user[again]]),
    )
    weights = np.ones(int(data.user.max()) + 1)
    weights[3] = 2.0
    weighted, plain = quality._Statistics(data)(weights), quality.measure(doubled, resamples=1)
    assert weighted == pytest.approx({name: e.mean for name, e in plain.items()})


def test_baselines_and_degenerate_data() -> None:
    data = scored()
    flat = quality.measure(quality.majority(data, np.array([1, 5, 3])), resamples=50)
    assert (flat["auc"].mean, flat["auc"].low, flat["auc"].high) == (0.5, 0.5, 0.5)
    assert flat["accuracy"].mean == pytest.approx((data.labels == 1).mean())
    words = quality.majority(data, np.array([3, 5, 7])).sentence_scores()
    assert len(set(words[words > 0.0])) == 1  # rounding must not rank equal responses by their length
    perfect = quality.measure(quality.copy_of_history(data, data.labels), resamples=50)
    assert perfect["accuracy"].mean == perfect["auc"].low == 1.0
    one = quality.Scored(
        probabilities=np.eye(3)[[2]],
        labels=np.array([2]),
        sentence=np.array([1]),
        response=np.array([0]),
        user=np.array([0]),
    )
    assert math.isnan(quality.measure(one)["auc"].mean)
    rows = {name: {"auc": Estimate(mean=0.9, users=1)} for name in ("reward model", "majority")}
    assert "from too few test users (1) to show anything (majority 0.900 [nan, nan])" in card.verdict(rows)
    rows["reward model"] = {"auc": quality.measure(one)["auc"]}
    assert card.verdict(rows).endswith("have one and the same label; label responses of both kinds.")
    assert {f"reward_model/{name}" for name in quality.METRICS} <= set(GLOSSARY)
