"""The specification of the log-prob ops: definitions, hard rows, and that a head never holds all its logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import tppo_kernels as tk
from torch.utils._python_dispatch import TorchDispatchMode
from tppo_kernels.testing import random_head, random_logits

logprobs = partial(tk.logprobs_from_logits, backend="reference")
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7}, id="temperature"),
    pytest.param({"softcap": 5.0, "temperature": 1.3, "logit_scale": 0.5}, id="softcap-scale"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_definition(options):
    logits, targets = random_logits(6, 50, torch.float64)
    x = logits * options.get("logit_scale", 1.0)
    if cap := options.get("softcap"):
        x = cap * torch.tanh(x / cap)
    distribution = torch.distributions.Categorical(logits=x / options.get("temperature", 1.0))
    logp, entropy = logprobs(logits, targets, **options)
    torch.testing.assert_close(logp, distribution.log_prob(targets))
    torch.testing.assert_close(entropy, distribution.entropy())


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(options):
    logits, targets = random_logits(3, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda x: logprobs(x, targets, **options), logits.requires_grad_())


def test_by_hand():
    logp, entropy = logprobs(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), torch.tensor([1, 0]))
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(logp, torch.stack([-log2, torch.tensor(0.0)]))
    torch.testing.assert_close(entropy, torch.stack([log2, torch.tensor(0.0)]))


def test_hard_rows():
    rows = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [0.0, torch.nan, 0.0], [0.0, -torch.inf, 0.0]])
    logp, entropy = logprobs(rows, torch.tensor([0, 2, 0, 1]))
    third = torch.tensor(3.0).log()
    assert logp[0] == 0.0
    assert entropy[0] == 0.0
    torch.testing.assert_close(logp[1], -third, atol=1e-3, rtol=0)  # one unit in the last place of 1e4
    assert logp[2].isnan()
    assert entropy[2].isnan()
    assert logp[3] == -torch.inf
    assert entropy[3].isfinite()


def test_half_precision_is_computed_in_fp32():
    logits, targets = random_logits(4, 100, torch.bfloat16)
    got, wide = logprobs(logits, targets), logprobs(logits.float(), targets)
    assert got[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, wide, strict=True))


def test_wrong_options_are_named():
    logits, targets = random_logits(2, 5)
    for options, sentence in [({"temperature": 0.0}, "temperature 0.0"), ({"softcap": -1.0}, "softcap -1.0")]:
        with pytest.raises(ValueError, match=sentence):
            logprobs(logits, targets, **options)
    with pytest.raises(ValueError, match="one row per target"):
        logprobs(logits, targets[:1])


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("options", [*OPTIONS, pytest.param({"bias": True}, id="bias")])
def test_head_is_the_logits_path_and_holds_one_chunk(options):
    hidden, weight, targets = random_head(21, 4, 64, torch.float64)
    options = dict(options)
    bias = torch.linspace(-1, 1, 64, dtype=torch.float64).requires_grad_() if options.pop("bias", None) else None
    inputs = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    upstream = torch.linspace(-1, 1, 42, dtype=torch.float64)

    def gradients(logp, entropy):
        return torch.autograd.grad(torch.cat([logp, entropy]) @ upstream, inputs)

    whole = logprobs(torch.nn.functional.linear(hidden, weight, bias), targets, **options)
    whole_gradients = gradients(*whole)
    with LargestTensor() as largest:
        head = tk.linear_logprobs(hidden, weight, targets, bias=bias, chunk_size=8, backend="reference", **options)
        head_gradients = gradients(*head)
    torch.testing.assert_close(head, whole)
    torch.testing.assert_close(head_gradients, whole_gradients)
    assert largest.entries <= 8 * 64


def test_head_of_nothing():
    hidden, weight, targets = random_head(0, 4, 7)
    logp, entropy = tk.linear_logprobs(hidden, weight, targets, backend="reference")
    assert logp.shape == entropy.shape == (0,)
