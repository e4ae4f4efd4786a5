"""The specification of gae and whiten, against the textbook loop and numbers worked by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import tppo_kernels as tk
from hypothesis import given, settings
from hypothesis import strategies as st
from tppo_kernels.testing import random_rollouts

gae = partial(tk.gae, backend="reference")
whiten = partial(tk.whiten, backend="reference")


def textbook(r, v, cu, gamma, lam, bootstrap, mask):
    """Equation 16 with Python floats, one sequence and one action at a time; masked actions are cut out first."""
    advantages, returns = [0.0] * len(r), [float(x) for x in v]
    for b in range(len(cu) - 1):
        kept = [a for a in range(cu[b], cu[b + 1]) if mask[a]]
        next_value, advantage = bootstrap[b], 0.0
        for a in reversed(kept):
            delta = r[a] + gamma * next_value - v[a]
            advantage = delta + gamma * lam[b] * advantage
            advantages[a], returns[a] = advantage, advantage + v[a]
            next_value = v[a]
    return advantages, returns


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0, None]),
    use_mask=st.booleans(),
    use_bootstrap=st.booleans(),
    seed=st.integers(0, 5),
)
def test_gae_is_the_textbook_loop(lengths, gamma, lam, use_mask, use_bootstrap, seed):
    x = random_rollouts(lengths, dtype=torch.float64, seed=seed)
    mask = x["mask"] if use_mask else torch.ones_like(x["mask"])
    bootstrap = x["bootstrap"] if use_bootstrap else torch.zeros_like(x["bootstrap"])
    lams = x["lam"] if lam is None else torch.full_like(x["lam"], lam)
    got = gae(
        x["rewards"], x["values"], x["cu_seqlens"], gamma=gamma, lam=x["lam"] if lam is None else lam,
        mask=mask if use_mask else None, bootstrap=bootstrap if use_bootstrap else None,
    )  # fmt: skip
    named = (x["rewards"], x["values"], x["cu_seqlens"])
    want = textbook(*(t.tolist() for t in named), gamma, lams.tolist(), bootstrap.tolist(), mask.tolist())
    for mine, truth in zip(got, want, strict=True):
        torch.testing.assert_close(mine, torch.tensor(truth, dtype=torch.float64))


def test_gae_by_hand():
    """r = (0, 1), V = (0.5, 0.25): delta = (0 + 0.9 * 0.25 - 0.5, 1 - 0.25) and A_0 = delta_0 + 0.45 A_1."""
    rewards, values = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.25, 1.0])
    advantages, returns = gae(rewards, values, torch.tensor([0, 2, 3]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([-0.275 + 0.45 * 0.75, 0.75, 1.0]))
    torch.testing.assert_close(returns, torch.tensor([0.225 + 0.45 * 0.75, 1.0, 2.0]))


def test_gae_of_a_truncated_response_bootstraps():
    rewards, values, cu = torch.zeros(2), torch.zeros(2), torch.tensor([0, 2])
    advantages, _ = gae(rewards, values, cu, gamma=0.5, lam=1.0, bootstrap=torch.tensor([8.0]))
    assert advantages.tolist() == [2.0, 4.0]


def test_gae_leaves_its_inputs_alone():
    x = random_rollouts([3, 0, 4], dtype=torch.float64)
    kept = {name: tensor.clone() for name, tensor in x.items()}
    gae(**x, gamma=0.9)
    assert all(torch.equal(x[name], kept[name]) for name in x)


def test_gae_sees_across_a_masked_action():
    rewards, values = torch.tensor([1.0, 99.0, 2.0]), torch.tensor([0.0, 77.0, 0.0])
    mask = torch.tensor([True, False, True])
    advantages, returns = gae(rewards, values, torch.tensor([0, 3]), gamma=1.0, lam=1.0, mask=mask)
    assert advantages.tolist() == [3.0, 0.0, 2.0]
    assert returns.tolist() == [3.0, 77.0, 2.0]


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]], ids=["no-sequence", "empty-sequence", "two-empty"])
def test_gae_of_nothing(cu):
    advantages, returns, stats = gae(torch.empty(0), torch.empty(0), torch.tensor(cu), return_stats=True)
    assert advantages.shape == returns.shape == (0,)
    assert stats.tolist() == [0.0, 0.0, 0.0]


def test_gae_keeps_no_graph_and_computes_half_precision_in_fp32():
    values = torch.full((3,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    advantages, returns = gae(torch.zeros(3, dtype=torch.bfloat16), values, torch.tensor([0, 3]))
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad


def test_gae_names_the_wrong_shape():
    with pytest.raises(ValueError, match=r"bootstrap has shape \(3,\): expected \(1,\)"):
        gae(torch.zeros(2), torch.zeros(2), torch.tensor([0, 2]), bootstrap=torch.zeros(3))


def test_whiten_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0])  # mean 2, unbiased variance 1
    torch.testing.assert_close(whiten(x, eps=0.0), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(whiten(2 * x, shift_mean=False, eps=0.0), torch.tensor([3.0, 4.0, 5.0]))
    masked = whiten(torch.tensor([1.0, torch.nan, 3.0]), mask=torch.tensor([True, False, True]), eps=0.0)
    torch.testing.assert_close(masked, torch.tensor([-(0.5**0.5), 0.0, 0.5**0.5]))


def test_a_masked_nan_is_in_no_gradient():
    x = torch.tensor([1.0, torch.nan, 3.0, 7.0], requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    (whiten(x, mask=mask) * torch.tensor([1.0, 2.0, 3.0, 5.0])).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[1] == 0.0


@pytest.mark.parametrize("count", [0, 1])
def test_whiten_of_too_little_has_no_variance(count):
    assert whiten(torch.full((count,), 5.0)).tolist() == [0.0] * count
    assert whiten(torch.full((2,), 5.0), mask=torch.tensor([False, count == 1])).tolist() == [0.0, 0.0]


def test_gae_statistics_whiten_without_another_reduction():
    x = random_rollouts([5, 1, 9], seed=3)
    advantages, _, stats = gae(x["rewards"], x["values"], x["cu_seqlens"], mask=x["mask"], return_stats=True)
    torch.testing.assert_close(whiten(advantages, mask=x["mask"], stats=stats), whiten(advantages, mask=x["mask"]))
    kept = advantages[x["mask"]]
    torch.testing.assert_close(
        stats, torch.stack([torch.tensor(float(len(kept))), kept.mean(), kept.var() * (len(kept) - 1)])
    )


def test_nan_is_never_hidden():
    advantages, _ = gae(torch.tensor([0.0, torch.nan, 0.0]), torch.zeros(3), torch.tensor([0, 2, 3]))
    assert advantages.isnan().tolist() == [True, True, False]
    assert whiten(torch.tensor([1.0, torch.nan])).isnan().all()
