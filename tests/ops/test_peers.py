"""Cross-checks against independent implementations: verl's and TRL's functions, and Liger's fused head.

Each is a test extra and its tests are skipped where it is not installed. Where a peer disagrees by design, the test says how.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
import tppo_kernels as tk
from tppo_kernels.testing import random_head, random_logits, random_ppo, random_rollouts


def peer(module: str) -> Any:
    """The module, or a skip: peers pull in much that warns or is missing."""
    pytest.importorskip(module.split(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module}: {error}")


def padded(x, name, lengths, fill=0.0):
    rows = x[name].split(lengths)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "observation-tokens"])
def test_verl_gae(masked):
    """verl pads, whitens the advantages itself, and lets masked positions show their neighbour's advantage."""
    algos = peer("verl.trainer.ppo.core_algos")
    lengths = [7, 1, 12, 3]
    x = random_rollouts(lengths, seed=4)
    kept = x["mask"] if masked else torch.ones_like(x["mask"])
    x["kept"] = kept.float()
    whitened, returns = algos.compute_gae_advantage_return(
        padded(x, "rewards", lengths), padded(x, "values", lengths), padded(x, "kept", lengths), 0.99, 0.9
    )
    inside = padded(x, "kept", lengths).bool()
    advantages, mine, stats = tk.gae(
        x["rewards"], x["values"], x["cu_seqlens"], gamma=0.99, lam=0.9, mask=kept, return_stats=True
    )
    torch.testing.assert_close(mine[kept], returns[inside])
    torch.testing.assert_close(tk.whiten(advantages, mask=kept, stats=stats)[kept], whitened[inside])


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_verl_policy_loss(dual_clip):
    """verl always has a dual clip (3 by default): without one it is given a bound that no ratio reaches."""
    algos = peer("verl.trainer.ppo.core_algos")
    x = random_ppo(300, seed=2)
    x["old_logp"][::10] -= 3.0  # ratios that reach the dual clip
    grads = []
    logp = x["logp"].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl deprecates it in favour of one that needs its configuration
        theirs, clipped, kl, dual = algos.compute_policy_loss(
            x["old_logp"][None], logp[None], x["advantages"][None], torch.ones(1, 300), cliprange=0.2,
            cliprange_low=0.2, cliprange_high=0.3, clip_ratio_c=dual_clip or 1e6,
        )  # fmt: skip
    grads.append(torch.autograd.grad(theirs, logp)[0])
    mine, metrics = tk.ppo_loss(logp, x["old_logp"], x["advantages"], clip_high=0.3, dual_clip=dual_clip)
    grads.append(torch.autograd.grad(mine, logp)[0])
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*grads)
    torch.testing.assert_close((metrics["clip_low"] + metrics["clip_high"]) / 300, clipped)
    torch.testing.assert_close(metrics["dual_clip"] / 300, dual)
    torch.testing.assert_close((x["old_logp"] - logp).mean(), kl)  # verl's ppo_kl is the k1 estimate, ours is k3


def test_verl_value_loss():
    algos = peer("verl.trainer.ppo.core_algos")
    x = random_ppo(300, seed=3)
    values = x["values"].requires_grad_()
    theirs, _ = algos.compute_value_loss(
        values[None], x["returns"][None], x["old_values"][None], torch.ones(1, 300), cliprange_value=0.2
    )
    mine, metrics = tk.ppo_loss(
        torch.zeros(300), torch.zeros(300), torch.zeros(300), values=values, old_values=x["old_values"],
        returns=x["returns"], value_coef=1.0,
    )  # fmt: skip
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, values)[0] for loss in (mine, theirs)))
    assert metrics["value_clip"] > 0


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_verl_kl_penalty(kind):
    """verl clamps k3 to 10 per token: the inputs stay below."""
    algos = peer("verl.trainer.ppo.core_algos")
    x = random_ppo(100)
    name = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}[kind]
    theirs = algos.kl_penalty(x["logp"], x["ref_logp"], name).sum()
    _, metrics = tk.ppo_loss(x["logp"], x["old_logp"], x["advantages"], ref_logp=x["ref_logp"], kl_estimator=kind)
    torch.testing.assert_close(metrics["kl_loss"], theirs)


def test_trl_logprob_and_entropy():
    utils = peer("trl.trainer.utils")
    logits, targets = random_logits(6, 300)
    logp, entropy = tk.logprobs_from_logits(logits, targets)
    torch.testing.assert_close(logp, utils.selective_log_softmax(logits, targets))
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits))


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_trl_chunked_head(softcap):
    """TRL walks chunks of the vocabulary, ours are of rows; TRL's entropy is a metric without gradient."""
    utils = peer("trl.trainer.utils")
    chunked = getattr(utils, "_ChunkedLogProbFunction", None)
    if chunked is None:
        pytest.skip("this TRL has no chunked head")
    hidden, weight, targets = random_head(12, 8, 130)
    hidden.requires_grad_()
    weight.requires_grad_()
    upstream = torch.linspace(-1, 1, 12)
    theirs = chunked.apply(hidden, weight, targets, 0.8, 50, softcap, 0.5)
    mine = tk.linear_logprobs(hidden, weight, targets, temperature=0.8, softcap=softcap, logit_scale=0.5, chunk_size=5)
    torch.testing.assert_close(mine, theirs[:2], rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out[0], [hidden, weight], upstream) for out in (mine, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_liger_fused_head():
    """Liger returns the NEGATIVE log-likelihood and the entropy of each token."""
    ops = peer("liger_kernel.ops")
    fused = getattr(ops, "LigerFusedLinearScaledCrossEntropyFunction", None)
    if fused is None:
        pytest.skip("this Liger has no fused head with entropy")
    hidden, weight, targets = random_head(12, 8, 130)
    hidden.requires_grad_()
    weight.requires_grad_()
    nll, entropy = fused.apply(hidden, weight, targets, 0.8, -100, 1, True)
    mine = tk.linear_logprobs(hidden, weight, targets, temperature=0.8)
    torch.testing.assert_close(mine, (-nll, entropy), rtol=1e-4, atol=1e-5)
    upstream = [torch.linspace(-1, 1, 12), torch.linspace(1, 0, 12)]
    grads = torch.autograd.grad(mine, [hidden, weight], upstream)
    theirs = torch.autograd.grad([nll, entropy], [hidden, weight], [-upstream[0], upstream[1]])
    torch.testing.assert_close(grads, theirs, rtol=1e-4, atol=1e-5)
