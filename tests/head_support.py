"""A head and a loss of its rows, for the tests of the head ops."""

from __future__ import annotations

import torch
import tppo_kernels as tk
from tppo_kernels.testing import random_head, random_ppo


def token_loss(logp, entropy, old_logp, advantages, values, returns):
    """A PPO loss of every kind of term, with the reference's formula on both sides."""
    return tk.ppo_loss(
        logp, old_logp, advantages, entropy=entropy, entropy_coef=0.05, values=values, returns=returns, value_clip=None,
        normalizer=1.0, backend="reference",
    )  # fmt: skip


def inputs(actions, dtype, vocab=130, hidden_size=6):
    hidden, weight, targets = random_head(actions, hidden_size, vocab, dtype)
    x = random_ppo(actions, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    bias = torch.linspace(-1, 1, vocab).to(dtype)
    return {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "old": x["logp"] - 3.0,
            "advantages": x["advantages"], "values": x["values"], "returns": x["returns"]}  # fmt: skip


def run_loss(
    x, backend, *, learned=("hidden", "weight", "bias", "values"), upstream=2.0, loss_fn=token_loss, **options
):
    x = {k: t.detach().requires_grad_(k in learned) for k, t in x.items()}
    rows = (x["old"], x["advantages"], x["values"], x["returns"])
    loss, stats = tk.linear_token_loss(
        x["hidden"], x["weight"], x["targets"], loss_fn, rows, bias=x["bias"], backend=backend, **options
    )
    grads = torch.autograd.grad(loss, [x[k] for k in learned], torch.tensor(upstream, dtype=loss.dtype))
    return [loss, *(stats[k] for k in sorted(stats)), *grads]


def wide(x):
    return {k: t.double() if t.is_floating_point() else t for k, t in x.items()}
