"""Arguments that do not fit are named; what a GPU cannot look at does no harm there."""

from __future__ import annotations

import pytest
import torch
import tppo_kernels as tk
from tppo_kernels.testing import random_logits, random_ppo


def logprobs(backend, **options):
    return tk.logprobs_from_logits(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), backend=backend, **options)


def segments(backend, cu_seqlens):
    return tk.gae(torch.zeros(2), torch.zeros(2), cu_seqlens, backend=backend)


WRONG = {
    "mask is torch.int64: pass mask.bool()": lambda b: tk.gae(
        torch.zeros(3), torch.zeros(3), torch.tensor([0, 3]), mask=torch.ones(3, dtype=torch.int64), backend=b
    ),
    "mask is torch.float32: pass mask.bool()": lambda b: tk.whiten(torch.zeros(3), mask=torch.ones(3), backend=b),
    "mask is torch.int32: pass mask.bool()": lambda b: tk.ppo_loss(
        *torch.zeros(3, 2), mask=torch.ones(2, dtype=torch.int32), backend=b
    ),
    "temperature nan: must be above 0 and finite": lambda b: logprobs(b, temperature=float("nan")),
    "temperature inf": lambda b: logprobs(b, temperature=float("inf")),
    "softcap inf": lambda b: logprobs(b, softcap=float("inf")),
    "logit_scale 0.0: must be finite and not 0": lambda b: logprobs(b, logit_scale=0.0),
    r"cu_seqlens are torch.int64 of shape \(\)": lambda b: segments(b, torch.tensor(2)),
    r"cu_seqlens are torch.int64 of shape \(0,\)": lambda b: segments(b, torch.empty(0, dtype=torch.int64)),
    "cu_seqlens are torch.float32": lambda b: segments(b, torch.tensor([0.0, 2.0])),
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn], ids=str)
def test_logits_of_a_strange_dtype_are_named(dtype, backend):
    x, targets = torch.zeros(2, 3).to(dtype), torch.zeros(2, dtype=torch.int64)
    for name in (backend, "reference"):
        with pytest.raises(TypeError, match=rf"logits: {dtype} is none of torch.float32"):
            tk.logprobs_from_logits(x, targets, backend=name)
        with pytest.raises(TypeError, match=r"logits_dtype: torch.int64 is none of"):
            tk.linear_logprobs(x.float(), x.float(), targets, logits_dtype=torch.int64, backend=name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_targets_of_any_integer_dtype(dtype, backend):
    logits, targets = random_logits(3, 200)
    for name in (backend, "reference"):
        got, wanted = (tk.logprobs_from_logits(logits, t, backend=name) for t in (targets.to(dtype), targets))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_forward_mode_derivatives_are_refused_where_they_would_be_dropped(backend):
    x, y = torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)
    calls = (
        lambda t, b: tk.logprobs_from_logits(t, y, backend=b)[0],
        lambda t, b: tk.linear_logprobs(t, x, y, backend=b)[0],
        lambda t, b: tk.ppo_loss(t[0], x[0], x[1], backend=b)[0],
        lambda t, b: tk.whiten(t[0], backend=b),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="no forward-mode derivative: use backend='reference'"):
            torch.func.jvp(lambda t, call=call: call(t, backend), (x,), (x,))
    for call in (calls[0], *calls[2:]):  # the head is checkpointed
        assert torch.func.jvp(lambda t, call=call: call(t, "reference"), (x,), (x**2,))[1].abs().sum() > 0


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
        cu, end = torch.tensor(cu_seqlens), cu_seqlens[-1]
        mine = tk.gae(x["old_logp"], x["old_values"], cu, backend=backend)
        truth = tk.gae(x["old_logp"][:end], x["old_values"][:end], cu, backend="reference")
        for a, b, rest in zip(mine, truth, (torch.zeros(300), x["old_values"]), strict=True):
            torch.testing.assert_close(a, torch.cat([b, rest[end:]]))
