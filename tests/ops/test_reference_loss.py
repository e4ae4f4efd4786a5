"""The specification of ppo_loss: numbers worked by hand, and its gradients against finite differences in fp64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import tppo_kernels as tk
from hypothesis import given, settings
from hypothesis import strategies as st
from tppo_kernels.reference import kl_estimate
from tppo_kernels.testing import random_ppo

ppo_loss = partial(tk.ppo_loss, backend="reference")
LOG2 = math.log(2.0)


def loss_and_gradient(log_ratio: float, advantage: float, **options) -> tuple[float, float, dict[str, float]]:
    logp = torch.tensor([log_ratio], requires_grad=True)
    loss, metrics = ppo_loss(logp, torch.zeros(1), torch.tensor([advantage]), **options)
    loss.backward()
    return loss.item(), logp.grad.item(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "gradient"),
    [
        (0.0, 3.0, -3.0, -3.0),  # first step: ratio exactly 1
        (LOG2, 3.0, -1.2 * 3.0, 0.0),  # too far up with a good action: clipped, no gradient
        (LOG2, -3.0, 6.0, 6.0),  # too far up with a bad action: pulled back in full
        (-LOG2, 3.0, -1.5, -1.5),  # too far down with a good action: pulled back
        (-LOG2, -3.0, 0.8 * 3.0, 0.0),  # too far down with a bad action: clipped
        (LOG2, 0.0, 0.0, 0.0),
    ],
)
def test_policy_term_by_hand(log_ratio, advantage, loss, gradient):
    got = loss_and_gradient(log_ratio, advantage)
    assert got[0] == pytest.approx(loss, abs=1e-6)
    assert got[1] == pytest.approx(gradient, abs=1e-6)


def test_clip_higher_dual_clip_and_weights_by_hand():
    assert loss_and_gradient(LOG2, 1.0, clip_high=0.5)[0] == pytest.approx(-1.5)
    loss, gradient, metrics = loss_and_gradient(math.log(8.0), -2.0, dual_clip=3.0, weights=torch.tensor([0.5]))
    assert (loss, gradient, metrics["dual_clip"]) == (pytest.approx(3.0), 0.0, 1.0)
    loss, gradient, metrics = loss_and_gradient(LOG2, -2.0, dual_clip=3.0, weights=torch.tensor([0.5]))
    assert (loss, gradient, metrics["dual_clip"]) == (pytest.approx(2.0), pytest.approx(2.0), 0.0)


def test_value_term_by_hand():
    """V = 2, V_old = 1, R = 3, clip 0.2: errors (2-3)^2 = 1 and (1.2-3)^2 = 3.24, so half of 3.24 and no gradient."""
    one, values = torch.ones(1), torch.tensor([2.0], requires_grad=True)
    loss, metrics = ppo_loss(
        torch.zeros(1), torch.zeros(1), 0 * one, values=values, old_values=one, returns=3 * one, value_coef=0.5
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.81)
    assert metrics["value_loss"].item() == pytest.approx(1.62)
    assert (values.grad.item(), metrics["value_clip"].item()) == (0.0, 1.0)
    loss, _ = ppo_loss(torch.zeros(1), torch.zeros(1), 0 * one, values=values, returns=3 * one, value_clip=None)
    assert loss.item() == pytest.approx(0.25)


def test_value_clip_counts_no_rounding():
    """V_old + (V - V_old) differs from V by an ulp: inside the clip nothing counts as clipped."""
    x = random_ppo(1000)
    _, metrics = ppo_loss(
        x["logp"],
        x["old_logp"],
        x["advantages"],
        values=x["values"],
        old_values=x["values"] + 0.01,
        returns=x["returns"],
    )
    assert metrics["value_clip"] == 0


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([LOG2]), torch.tensor([0.0])
    for kind, value in [("k1", LOG2), ("k2", LOG2**2 / 2), ("k3", 0.5 - 1 + LOG2)]:
        assert kl_estimate(logp, ref, kind).item() == pytest.approx(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(logp, ref, "k4")  # type: ignore[arg-type]


def test_metrics_are_sums_by_hand():
    ratios, advantages = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([-1.0, 1.0, 1.0])
    _, metrics = ppo_loss(ratios.log(), torch.zeros(3), advantages)
    assert metrics["ratio"].item() == pytest.approx(3.5)
    assert metrics["ratio_sq"].item() == pytest.approx(5.25)
    assert metrics["approx_kl"].item() == pytest.approx(0.5 - 1 + LOG2 + 2 - 1 - LOG2)  # sum of r - 1 - log r
    assert (metrics["clip_low"], metrics["clip_high"]) == (1, 1)


def all_terms(x: dict[str, torch.Tensor], kind: str, normalizer: float | None = None) -> torch.Tensor:
    return ppo_loss(
        **x, kl_coef=0.1, kl_estimator=kind, entropy_coef=0.01, dual_clip=2.0, clip_high=0.3, normalizer=normalizer
    )[0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradients_of_all_terms(kind):
    x = random_ppo(40, dtype=torch.float64)
    names = ("logp", "entropy", "values")
    inputs = tuple(x[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(lambda *t: all_terms({**x, **dict(zip(names, t, strict=True))}, kind), inputs)


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(0, 16), seed=st.integers(0, 9))
def test_microbatches_add_up(cut, seed):
    x = random_ppo(16, dtype=torch.float64, seed=seed)
    parts = [{k: v[s] for k, v in x.items()} for s in (slice(0, cut), slice(cut, 16))]
    torch.testing.assert_close(sum(all_terms(p, "k3", 16.0) for p in parts), all_terms(x, "k3"))


def test_no_action_is_no_loss():
    empty = torch.empty(0, requires_grad=True)
    loss, metrics = ppo_loss(empty, torch.empty(0), torch.empty(0))
    loss.backward()
    assert loss.item() == 0.0
    assert set(metrics.values()) == {0.0} or all(value == 0 for value in metrics.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kl_coef": 0.1}, "kl_coef 0.1 needs ref_logp"),
        ({"entropy_coef": 0.1}, "entropy_coef 0.1 needs entropy"),
        ({"dual_clip": 0.5}, "dual_clip 0.5: must be above 1"),
        ({"values": torch.zeros(2)}, "the value loss needs returns"),
        ({"weights": torch.zeros(3)}, r"weights has shape \(3,\): expected \(2,\)"),
    ],
)
def test_missing_inputs_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ppo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), **options)
