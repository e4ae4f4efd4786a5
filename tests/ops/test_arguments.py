"""Arguments that do not fit are named; what a GPU cannot look at does no harm there."""

from __future__ import annotations

import pytest
import torch
import tppo_kernels as tk
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tppo_kernels.checks import call_loss
from tppo_kernels.testing import poisoned, random_logits, random_ppo


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


def logprobs(backend, **options):
    return tk.logprobs_from_logits(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), backend=backend, **options)


def segments(backend, cu_seqlens):
    return tk.gae(torch.zeros(2), torch.zeros(2), cu_seqlens, backend=backend)


def head(backend, hidden=(2, 4), weight=(7, 4), **options):
    targets = torch.zeros(2, dtype=torch.int64)
    x = torch.zeros(hidden), torch.zeros(weight), targets, lambda logp, *_: logp.sum()
    return tk.linear_token_loss(*x, backend=backend, **options)


def ppo(backend, **options):
    return tk.ppo_loss(*torch.zeros(3, 2), backend=backend, **options)


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
    "cu_seqlens are torch.int16": lambda b: segments(b, torch.tensor([0, 2], dtype=torch.int16)),
    "cu_seqlens has one entry and so no sequence": lambda b: segments(b, torch.tensor([0])),
    r"stats has shape \(2,\): expected \(3,\)": lambda b: tk.whiten(torch.zeros(3), stats=torch.zeros(2), backend=b),
    r"logits has shape \(1, 0\): its rows have no entry": lambda b: tk.logprobs_from_logits(
        torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64), backend=b
    ),
    r"weight has shape \(0, 4\): the vocabulary has no token": lambda b: head(b, weight=(0, 4)),
    r"rows\[0\] has shape \(\): its first dimension": lambda b: head(b, rows=(torch.zeros(()),)),
    r"normalizer has shape \(1,\): give a number, or a tensor of shape \(\)": lambda b: head(b, normalizer=torch.ones(1)),
    r"normalizer has shape \(2,\)": lambda b: ppo(b, normalizer=torch.ones(2)),
    "clip_low nan: must be at least 0": lambda b: ppo(b, clip_low=float("nan")),
    "clip_high -0.5: must be at least 0": lambda b: ppo(b, clip_high=-0.5),
    "value_clip -0.2: must be at least 0": lambda b: ppo(b, value_clip=-0.2),
    "dual_clip nan: must be above 1": lambda b: ppo(b, dual_clip=float("nan")),
    "inplace_backward would overwrite logits that are a leaf": lambda b: tk.logprobs_from_logits(
        torch.zeros(1, 3, requires_grad=True), torch.zeros(1, dtype=torch.int64), inplace_backward=True, backend=b
    ),
    "targets is on meta and logits on cpu: move them to one device": lambda b: tk.logprobs_from_logits(
        torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64, device="meta"), backend=b
    ),
    "weight is on meta": lambda b: tk.linear_logprobs(
        torch.zeros(1, 3), torch.zeros(4, 3, device="meta"), torch.zeros(1, dtype=torch.int64), backend=b
    ),
    r"rows\[0\] is on meta": lambda b: head(b, rows=(torch.zeros(2, device="meta"),)),
    "cu_seqlens is on meta": lambda b: segments(b, torch.tensor([0, 2], device="meta")),
    "mask is on meta": lambda b: tk.whiten(
        torch.zeros(3), mask=torch.ones(3, dtype=torch.bool, device="meta"), backend=b
    ),
    "returns is on meta": lambda b: ppo(b, returns=torch.zeros(2, device="meta")),
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
        lambda t, b: tk.ppo_loss(x[0], x[0], t[1], backend=b)[0],
        lambda t, b: tk.whiten(t[0], backend=b),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="no forward-mode derivative: use backend='reference'"):
            torch.func.jvp(lambda t, call=call: call(t, backend), (x,), (x,))
    for call in (calls[0], *calls[2:]):  # the head is checkpointed
        assert torch.func.jvp(lambda t, call=call: call(t, "reference"), (x,), (x**2,))[1].abs().sum() > 0


def test_numbers_among_the_metrics_are_no_copies_to_the_device():
    """Such a copy would wait for a GPU in each chunk: tensors of one that is not there."""
    with FakeTensorMode(), Recorded() as recorded:
        loss = torch.empty((), device="cuda")
        _, metrics = call_loss(lambda: (loss, {"rows": 3, "part": 0.5, "any": True}))
    assert [m.dtype for m in metrics.values()] == [torch.int64, torch.float32, torch.bool]
    assert {m.device for m in metrics.values()} == {loss.device}
    assert set(recorded.calls) == {"aten::empty.memory_format", "aten::full"}


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
    x = random_ppo(70)
    for cu_seqlens in ([0, 2], [0, 35, 50], [0, 0], [0, 70], [3, 35, 50], [64, 70]):
        cu, (first, end) = torch.tensor(cu_seqlens), (cu_seqlens[0], cu_seqlens[-1])
        own, lams = slice(first, end), poisoned(torch.full((len(cu) - 1,), 0.9))
        for mask in (None, torch.arange(70) % 7 != 0):
            options = {"lam": lams, "bootstrap": lams}
            mine = tk.gae(x["old_logp"], x["old_values"], cu, mask=mask, return_stats=True, backend=backend, **options)
            mask = mask if mask is None else mask[own]
            truth = tk.gae(
                x["old_logp"][own], x["old_values"][own], cu - first, mask=mask, return_stats=True, backend="reference",
                **options,
            )  # fmt: skip
            for a, b, rest in zip(mine, truth, (torch.zeros(70), x["old_values"]), strict=False):
                torch.testing.assert_close(a, torch.cat([rest[:first], b, rest[end:]]))
            torch.testing.assert_close(mine[2], truth[2])


def test_a_target_outside_of_the_vocabulary_is_nan_on_a_gpu(backend):
    """Its gradient too: with a finite one the model would learn from a token that does not exist."""
    if backend != "triton":
        pytest.skip("the native kernels refuse it")
    logits, targets = random_logits(4, 33)
    targets[1], targets[2] = 33, -1
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        logp, _ = tk.logprobs_from_logits(leaf * 1, targets, inplace_backward=inplace, backend=backend)
        logp.sum().backward()
        for found in (logp, leaf.grad[:, 0], leaf.grad[:, 32]):
            assert found.isnan().tolist() == [False, True, True, False]
