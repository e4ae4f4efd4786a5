"""Arguments that do not fit are named; what a GPU cannot look at does no harm there."""

from __future__ import annotations

import pytest
import torch
import tppo_kernels as tk
from tppo_kernels.testing import random_ppo

WRONG = {
    "mask is torch.int64: pass mask.bool()": lambda b: tk.gae(
        torch.zeros(3), torch.zeros(3), torch.tensor([0, 3]), mask=torch.ones(3, dtype=torch.int64), backend=b
    ),
    "mask is torch.float32: pass mask.bool()": lambda b: tk.whiten(torch.zeros(3), mask=torch.ones(3), backend=b),
    "mask is torch.int32: pass mask.bool()": lambda b: tk.ppo_loss(
        *torch.zeros(3, 2), mask=torch.ones(2, dtype=torch.int32), backend=b
    ),
    "targets are torch.float32: give token ids": lambda b: tk.logprobs_from_logits(
        torch.zeros(2, 3), torch.zeros(2), backend=b
    ),
    r"logits has shape \(2, 3\) and targets \(3,\)": lambda b: tk.logprobs_from_logits(
        torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), backend=b
    ),
    r"weight has shape \(7, 5\): expected \(vocabulary, 4\), as hidden": lambda b: tk.linear_logprobs(
        torch.zeros(2, 4), torch.zeros(7, 5), torch.zeros(2, dtype=torch.int64), backend=b
    ),
    r"bias has shape \(1,\): expected \(7,\)": lambda b: tk.linear_logprobs(
        torch.zeros(2, 4), torch.zeros(7, 4), torch.zeros(2, dtype=torch.int64), bias=torch.zeros(1), backend=b
    ),
    r"rows\[1\] has shape \(3,\): its first dimension must be the 2 targets": lambda b: tk.linear_token_loss(
        torch.zeros(2, 4), torch.zeros(7, 4), torch.zeros(2, dtype=torch.int64), lambda *_: None,
        (torch.zeros(2), torch.zeros(3)), backend=b,
    ),
    r"rows is a tensor of shape \(2,\): give a sequence of tensors": lambda b: tk.linear_token_loss(
        torch.zeros(2, 4), torch.zeros(7, 4), torch.zeros(2, dtype=torch.int64), lambda *_: None, torch.zeros(2), backend=b
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_arguments_are_named(sentence, backend):
    for name in (backend, "reference"):
        with pytest.raises(ValueError, match=sentence):
            WRONG[sentence](name)


def test_tritons_kernels_refuse_float64(backend):
    if backend != "triton":
        pytest.skip("the native kernels compute in float64")
    x = torch.zeros(3, dtype=torch.float64)
    for call in (tk.whiten, tk.whitening_stats, lambda x, backend: tk.gae(x, x, torch.tensor([0, 3]), backend=backend)):
        with pytest.raises(ValueError, match="use backend='reference' for float64"):
            call(x, backend=backend)


def test_actions_of_no_sequence_have_no_advantage_on_a_gpu(backend):
    """A GPU cannot refuse what it does not look at, as the native kernels do."""
    if backend != "triton":
        pytest.skip("the native kernels refuse them")
    x = random_ppo(300)
    for cu_seqlens in ([0, 2], [0, 130, 200], [0, 0], [0, 300]):
        cu = torch.tensor(cu_seqlens)
        mine, truth = (
            tk.gae(x["old_logp"], x["old_values"], cu, return_stats=False, backend=name)
            for name in (backend, "reference")
        )
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b)
