"""``compact_rows``: dead rows are left out of dX and dW, and nothing else changes. Counted on the host or on the device.

On ``triton`` (the interpreter's process) ``compact_rows=True`` is the path that an accelerator takes.
"""

from __future__ import annotations

import os

import pytest
import torch
import tppo_kernels as tk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from tppo_kernels import head
from tppo_kernels.testing import assert_close, poisoned, poisoned_memory, random_head

LIVE = [
    pytest.param(lambda i: i % 3 == 0, id="a-third"),
    pytest.param(lambda i: i >= 0, id="all"),
    pytest.param(lambda i: i < 0, id="none"),
    pytest.param(lambda i: i == 18, id="the-last"),
    pytest.param(lambda i: (i < 5) | (i == 17), id="a-chunk-without"),
]
CHOICES = [True, False, None]


def masked_loss(logp, entropy, live):
    return torch.where(live, logp - 0.3 * entropy, 0.0).sum(), {}


def gradients(hidden, weight, bias, targets, live, backend, compact, *, chunk_size=8, **options):
    """[loss, dX, dW, db] of the masked loss, at three units and then at four."""
    out = []
    for units in (3, 4):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        options |= {"bias": leaves[2], "chunk_size": chunk_size, "compact_rows": compact, "backend": backend}
        if units == 3:
            loss, _ = tk.linear_token_loss(*leaves[:2], targets, masked_loss, (live,), **options)
        else:
            loss = masked_loss(*tk.linear_logprobs(*leaves[:2], targets, **options), live)[0] / len(targets)
        out += [loss, *torch.autograd.grad(loss, leaves)]
    return out


def inputs(rows, vocab, size, dtype=torch.float32, seed=0):
    hidden, weight, targets = random_head(rows, size, vocab, dtype, seed=seed)
    return hidden, weight, torch.linspace(-1, 1, vocab).to(dtype), targets


@pytest.mark.parametrize("compact", CHOICES)
@pytest.mark.parametrize("live", LIVE)
def test_gradients(live, compact, backend):
    x, mask = inputs(19, 67, 21), live(torch.arange(19))
    with poisoned_memory():
        got = gradients(*(poisoned(t) for t in x), mask, backend, compact)
    wide = [t.double() if t.is_floating_point() else t for t in x]
    assert_close(got, gradients(*x, mask, "reference", compact), gradients(*wide, mask, "reference", compact))
    assert (got[1][~mask] == 0).all()
    assert (got[5][~mask] == 0).all()


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["bf16-logits", "fp32-logits"])
def test_gradients_in_bf16(logits_dtype, backend):
    """Several tiles each way. A GEMM of 16-bit operands rounds fp32 gradients of logits to them, as on a GPU."""
    x, mask = inputs(45, 70, 70, torch.bfloat16), torch.arange(45) % 6 > 0
    wide = [t.double() if t.is_floating_point() else t for t in x]
    options = {"chunk_size": 45, "logits_dtype": logits_dtype}
    with poisoned_memory():
        got = gradients(*(poisoned(t) for t in x), mask, backend, True, **options)
    eager = gradients(*x, mask, "reference", True, **options)
    truth = gradients(*wide, mask, "reference", True)
    for mine, theirs, exact in zip(got, eager, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + 2.0**-8 * exact.norm()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 20), vocab=st.integers(1, 40), size=st.integers(1, 40), transposed=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_shape_and_strides(backend, rows, vocab, size, transposed, share, seed):
    x = inputs(rows, vocab, size, seed=seed)
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < share
    hidden, weight = (t.T.contiguous().T if transposed else t for t in x[:2])
    results = [gradients(hidden, weight, *x[2:], mask, b, True) for b in (backend, "reference")]
    wide = [t.double() if t.is_floating_point() else t for t in x]
    assert_close(*results, gradients(*wide, mask, "reference", True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probabilities_do_not_depend_on_it(dtype, backend):
    """To the bit, and so the first ratio is exactly 1 whatever was chosen before and after."""
    hidden, weight, _, targets = inputs(19, 67, 21, dtype)
    seen = []

    def loss_fn(logp, entropy):
        seen.append(logp.detach())
        return (logp * (entropy > 1)).sum(), {}

    with torch.no_grad():
        old = tk.linear_logprobs(hidden, weight, targets, chunk_size=8, compact_rows=False, backend=backend)[0]
    tk.linear_token_loss(
        hidden.requires_grad_(), weight, targets, loss_fn, chunk_size=8, compact_rows=True, backend=backend
    )
    assert torch.equal((torch.cat(seen) - old).exp(), torch.ones(19))


def test_a_nan_row_is_live(backend):
    """A gradient of NaN must reach dX and dW, not vanish with the dead rows."""
    x, mask = inputs(19, 67, 21), torch.arange(19) % 3 == 0

    def loss_fn(logp, _, live):
        return (logp * torch.where(live, torch.nan, 0.0)).sum(), {}

    leaf = x[0].requires_grad_()
    loss, _ = tk.linear_token_loss(leaf, x[1], x[3], loss_fn, (mask,), compact_rows=True, backend=backend)
    loss.backward()
    assert torch.equal(leaf.grad.isnan().all(1), mask)
    assert (leaf.grad[~mask] == 0).all()


def test_same_bits_every_time(backend):
    x, mask = inputs(20, 67, 21), torch.arange(20) % 2 == 0
    one, other = (gradients(*x, mask, backend, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


if os.environ.get("TRITON_INTERPRET") == "1":  # a CPU counts on the host

    class NothingReachesTheHost(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_to_copy"), name
            return func(*args, **(kwargs or {}))

    def test_the_count_stays_on_the_device(backend):
        x, mask = inputs(19, 67, 21), torch.arange(19) % 3 == 0
        options = {"chunk_size": 8, "compact_rows": True, "backend": backend}
        hidden = x[0].requires_grad_()
        with NothingReachesTheHost():
            tk.linear_token_loss(hidden, x[1], x[3], masked_loss, (mask,), **options)

    @pytest.mark.parametrize("units", [3, 4])
    def test_wide_gradients_are_rounded_once_by_their_own_kernel(units, backend, monkeypatch):
        """Both GEMMs read one 16-bit tensor; a bias, which needs the wide one, changes no bit of theirs."""
        x, mask = inputs(19, 67, 21, torch.bfloat16), torch.arange(19) % 3 > 0
        seen, add, found = [], head.Head._add_live, []

        def spy(self, chosen, dz, *rest):
            seen.append(dz)
            add(self, chosen, dz, *rest)

        monkeypatch.setattr(head.Head, "_add_live", spy)
        for bias in (None, x[2].clone().requires_grad_()):
            leaves = [t.clone().requires_grad_() for t in x[:2]]
            options = {"chunk_size": 8, "compact_rows": True, "logits_dtype": torch.float32, "backend": backend}
            options |= {"bias": x[2] if bias is None else bias}
            if units == 3:
                loss, _ = tk.linear_token_loss(*leaves, x[3], masked_loss, (mask,), **options)
            else:
                loss = masked_loss(*tk.linear_logprobs(*leaves, x[3], **options), mask)[0]
            found.append(torch.autograd.grad(loss, leaves))
        assert {dz.dtype for dz in seen} == {torch.bfloat16}
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    @pytest.mark.parametrize("rows", [1, 15, 16, 17, 300])
    def test_finding_live_rows(rows):
        from tppo_kernels.triton_ops.live_rows import find

        g = torch.Generator().manual_seed(rows)
        c, e = ((torch.rand(rows, generator=g) < 0.3).float() for _ in range(2))
        for pair in ((c, e), (c, None), (None, e), (c * torch.nan, e), (c * -0.0, e)):
            wanted = sum((x != 0).int() for x in pair if x is not None).nonzero().squeeze(1)
            with poisoned_memory():
                live = find(*(None if x is None else poisoned(x) for x in pair))
            assert live.number.item() == len(wanted)
            assert live.where[: len(wanted)].tolist() == wanted.tolist()


def test_opcheck_and_compile(backend):
    hidden, weight, bias, targets = inputs(9, 33, 8)
    args = [t.requires_grad_() for t in (hidden, weight, bias)]
    op = getattr(getattr(torch.ops, tk.__name__), f"{backend}_linear_logprobs").default
    library.opcheck(op, (*args, targets, 0.7, 0.0, 1.0, 4, None, True))
    mask = torch.arange(9) % 2 == 0

    def step(h, w):
        rows = (mask,)
        return tk.linear_token_loss(h, w, targets, masked_loss, rows, chunk_size=4, compact_rows=True, backend=backend)[
            0
        ]

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        found.append(torch.autograd.grad(run(*leaves), leaves))
    torch.testing.assert_close(*found)
