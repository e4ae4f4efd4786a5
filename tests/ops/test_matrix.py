"""Every op of a fused backend over awkward shapes, against the specification: one tolerance rule, memory full of NaN.

Runs on ``native`` here and on ``triton`` in the interpreter's process (see test_triton_interpreter.py).
"""

from __future__ import annotations

import os

import pytest
import torch
import tppo_kernels as tk
from torch import library
from tppo_kernels.testing import (
    assert_close,
    poisoned,
    poisoned_memory,
    random_logits,
    random_ppo,
    random_rollouts,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDE = [] if INTERPRETED else [torch.float64]  # Triton's kernels compute in fp32
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *WIDE]
SHAPES = [
    pytest.param(1, 1, id="one-entry"),
    pytest.param(3, 17, id="less-than-a-vector"),
    pytest.param(2, 2049, id="one-over-a-block"),
    pytest.param(2, 4_003 if INTERPRETED else 32_003, id="prime-vocabulary"),  # of smaller blocks, see conftest.py
    pytest.param(2, 2064, id="multiple-of-16"),
    *([] if INTERPRETED else [pytest.param(3, 50_257, id="gpt2-vocabulary")]),
]
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7, "logit_scale": -0.5}, id="temperature-scale"),
    pytest.param({"softcap": 5.0, "temperature": 1.3}, id="softcap"),
]
FLOATS = (torch.float32, torch.float64)


def logprobs(x, targets, backend, upstream, **options):
    """(logp, entropy, gradient) with upstream gradients of both signs, one row's both 0."""
    x = x.detach().requires_grad_()
    logp, entropy = tk.logprobs_from_logits(x.view_as(x), targets, backend=backend, **options)
    torch.autograd.backward([logp, entropy], [u.to(logp.dtype) for u in upstream])
    return logp, entropy, x.grad


def check_logprobs(logits, targets, backend, **options):
    rows = len(targets)
    upstream = torch.linspace(-1.0, 2.0, rows), torch.linspace(1.0, -1.0, rows)
    upstream[0][rows // 2] = upstream[1][rows // 2] = 0.0 if rows > 1 else 1.0
    eager = logprobs(logits, targets, "reference", upstream, **options)
    truth = logprobs(logits.double(), targets, "reference", upstream, **options)
    inplace = options | {"inplace_backward": True}
    with poisoned_memory():
        got = logprobs(poisoned(logits), poisoned(targets), backend, upstream, **options)
        again = logprobs(poisoned(logits), poisoned(targets), backend, upstream, **inplace)
    assert_close(got, eager, truth, "logp, entropy, gradient")
    for one, other in zip(got, again, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    return got


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_logprobs(rows, vocab, dtype, options, backend):
    check_logprobs(*random_logits(rows, vocab, dtype), backend, **options)


def test_ignored_targets(backend):
    """Their rows are 0 in results and gradient, and change no other row, in place or not."""
    logits, targets = random_logits(6, 2500)
    ignored = torch.tensor([True, False, True, False, False, True])
    got = check_logprobs(logits, targets.masked_fill(ignored, -100), backend)
    assert all((t[ignored] == 0).all() for t in got)
    upstream = torch.linspace(-1.0, 2.0, 6)[~ignored], torch.linspace(1.0, -1.0, 6)[~ignored]
    upstream[0][1] = upstream[1][1] = 0.0
    alone = logprobs(logits[~ignored], targets[~ignored], backend, upstream)
    assert all(torch.equal(a[~ignored], b) for a, b in zip(got, alone, strict=True))
    logits[0, 7] = torch.nan
    nothing = logprobs(logits, torch.full((6,), -100), backend, (torch.ones(6), torch.ones(6)))
    assert not any(t.any() for t in nothing)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([-1e4] * 5 + [-1.1e4], id="very-negative"),
        pytest.param([30.0, 0.0, -30.0, 0.0, 0.0, 0.0], id="one-dominant"),
        pytest.param([0.0, -torch.inf, 1.0, -torch.inf, 2.0, -3.0], id="some-minus-inf"),
        pytest.param([-torch.inf] * 3 + [0.5, 1.0, -1.0], id="starts-with-minus-inf"),
        pytest.param([0.0, 1.0, torch.nan, 2.0, 0.0, 0.0], id="nan"),
        pytest.param([-torch.inf] * 6, id="all-minus-inf"),
        pytest.param([200.0, 100.0, -200.0, 0.0, 199.0, 1.0], id="wide"),
    ],
)
@pytest.mark.parametrize("target", [0, 3])
def test_hard_rows(row, target, backend):
    """A row in pieces that fall into several blocks: its first, one in the middle, its last."""
    logits = torch.full((1, 4099), -torch.inf if row[0] == -torch.inf else row[-1])
    where = torch.tensor([0, 1, 2, 2050, 4097, 4098])
    logits[0, where] = torch.tensor(row)
    check_logprobs(logits, where[[target]], backend)


def test_certain_token_has_an_exact_gradient(backend):
    """p -> 1: 1 - p must come from the log-probability, for it is 0 when p is rounded first."""
    logits, targets = torch.tensor([[12.0, 0.0, 0.0]]), torch.tensor([0])
    _, _, gradient = logprobs(logits, targets, backend, (torch.ones(1), torch.zeros(1)))
    _, _, truth = logprobs(logits.double(), targets, "reference", (torch.ones(1), torch.zeros(1)))
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-2, atol=0)


def test_rows_without_gradient_are_exactly_zero(backend):
    logits, targets = random_logits(3, 100)
    logits[1, 5] = torch.nan
    _, _, gradient = logprobs(logits, targets, backend, (torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3)))
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).any()


def test_rows_beyond_two_to_the_31_entries(backend):
    """Two rows 2^31 entries apart, in memory that is reserved and never touched between them."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 64), (2**31, 1))
    logits, targets = random_logits(2, 64, torch.bfloat16)
    far.copy_(logits)
    got = tk.logprobs_from_logits(far, targets, backend=backend)
    assert_close(got, *(tk.logprobs_from_logits(x, targets, backend="reference") for x in (logits, logits.double())))


def test_expanded_upstream_gradients(backend):
    logits, targets = random_logits(4, 33)
    results = []
    for name, x in [(backend, logits), ("reference", logits), ("reference", logits.double())]:
        x = x.detach().requires_grad_()
        sum(tk.logprobs_from_logits(x, targets, backend=name)).sum().backward()
        results.append(x.grad)
    assert_close(*results)


def test_only_one_output_used(backend):
    logits, targets = random_logits(4, 33)
    for pick in (0, 1):
        results = []
        for name, x in [(backend, logits), ("reference", logits), ("reference", logits.double())]:
            x = x.detach().requires_grad_()
            tk.logprobs_from_logits(x, targets, backend=name)[pick].sum().backward()
            results.append(x.grad)
        assert_close(*results)


def test_overwriting_spares_entries_that_others_share(backend):
    """An expanded row is stored once: its gradients must not be."""
    row, targets = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 3])
    grads = []
    for name, inplace in ((backend, True), ("reference", False)):
        leaf = row.clone().requires_grad_()
        logp, _ = tk.logprobs_from_logits(leaf.expand(3, 9), targets, inplace_backward=inplace, backend=name)
        logp.sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_overwriting_spares_rows_that_overlap(backend):
    grads = []
    for name, inplace in ((backend, True), ("reference", False)):
        leaf = torch.randn(20, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logp, _ = tk.logprobs_from_logits(
            (leaf * 1).unfold(0, 11, 3), torch.tensor([0, 3, 3, 10]), inplace_backward=inplace, backend=name
        )
        logp.sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_a_gradient_that_overwrote_its_logits_is_no_part_of_the_graph(backend):
    logits, targets = random_logits(2, 20)
    logits = logits.requires_grad_() * 1
    logp, _ = tk.logprobs_from_logits(logits, targets, inplace_backward=True, backend=backend)
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    assert not gradient.requires_grad


def test_a_graph_of_a_gradient_that_overwrites_is_refused(backend):
    logits, targets = random_logits(2, 20)
    logits = logits.requires_grad_() * 1
    logp, _ = tk.logprobs_from_logits(logits, targets, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="inplace_backward has no second derivative here"):
        torch.autograd.grad(logp.sum(), logits, create_graph=True)


def test_second_backward_of_an_overwritten_gradient_is_loud(backend):
    logits, targets = random_logits(2, 20)
    logp, _ = tk.logprobs_from_logits(logits.requires_grad_() * 1, targets, inplace_backward=True, backend=backend)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


TILE = 16 if INTERPRETED else 128  # see conftest.py
LENGTHS = [
    pytest.param([], id="nothing"),
    pytest.param([0, 0], id="empty-sequences"),
    pytest.param([1], id="one-action"),
    pytest.param([1] * (5 * TILE // 2), id="one-action-each"),
    pytest.param([0, 5, 0, 0, 40, 1, 0], id="with-empty"),
    pytest.param([0] * 150 + [3, 4] + [0] * 120 + [2], id="more-sequences-than-probes"),
    pytest.param([11 * TILE // 2], id="longer-than-a-tile"),
    pytest.param([TILE // 2 + 6, 1, 5 * TILE // 2, TILE - 9, TILE + 7], id="mixed"),
]


def as_dtype(x, dtype):
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in x.items()}


@pytest.mark.parametrize(
    ("options", "gamma", "lam"),
    [
        pytest.param((), 1.0, 0.95, id="plain"),
        pytest.param(("bootstrap",), 0.99, None, id="bootstrap-lambdas"),
        pytest.param(("mask",), 1.0, 1.0, id="mask-no-decay"),
        pytest.param(("mask", "bootstrap"), 0.9, None, id="mask-bootstrap-lambdas"),
        pytest.param(("mask", "bootstrap"), 0.0, 1.0, id="gamma-0"),
        pytest.param(("bootstrap",), 1.0, 0.0, id="lambda-0"),
    ],
)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gae(lengths, options, gamma, lam, backend):
    x = random_rollouts(lengths, seed=len(lengths))
    lam = "lam" if lam is None else lam

    def run(name, dtype, wrap=lambda t: t):
        y = {k: wrap(t) for k, t in as_dtype(x, dtype).items()}
        extra = {k: y[k] for k in options} | {"lam": y["lam"] if lam == "lam" else lam}
        return tk.gae(y["rewards"], y["values"], y["cu_seqlens"], gamma=gamma, return_stats=True, backend=name, **extra)

    with poisoned_memory():
        got = run(backend, torch.float32, poisoned)
    assert_close(got, run("reference", torch.float32), run("reference", torch.float64), "advantages, returns, stats")


def test_gae_keeps_a_sequences_nan_to_itself(backend):
    x = random_rollouts([4, 4, 4])
    x["rewards"][5] = torch.nan
    for mask in (None, torch.ones(12, dtype=torch.bool)):
        advantages, _ = tk.gae(x["rewards"], x["values"], x["cu_seqlens"], mask=mask, backend=backend)
        assert advantages.isnan().tolist() == [False] * 4 + [True] * 2 + [False] * 6


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 70_000])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_whiten(count, masked, backend):
    g = torch.Generator().manual_seed(count)
    x, mask = torch.randn(count, generator=g) + 3.0, torch.rand(count, generator=g) < 0.5
    mask = mask if masked else None
    for op in (tk.whiten, tk.whitening_stats):
        with poisoned_memory():
            got = op(poisoned(x), mask=mask if mask is None else poisoned(mask), backend=backend)
        assert_close(got, *(op(x.to(d), mask=mask, backend="reference") for d in FLOATS))


def test_equal_entries_deviate_by_nothing(backend):
    """A rounded sum over their number is not their mean: divided by a spread of 0, its error would be far from 0."""
    for x in (torch.full((10_007,), 1e5 + 0.3), torch.full((3,), 0.1), torch.full((9001,), -7e-3)):
        for mask in (None, torch.arange(len(x)) >= len(x) // 2):
            for name in (backend, "reference"):
                assert not tk.whiten(x, mask=mask, backend=name).any()


def test_statistics_are_differentiated(backend):
    x = random_ppo(20)["advantages"]
    found = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(tk.whitening_stats(leaf, backend=name)[1:].sum(), leaf)
        found.append(gradient)
    torch.testing.assert_close(*found)


def whole_step(logits, targets, x, backend):
    logp, entropy = tk.logprobs_from_logits(logits, targets, temperature=0.9, backend=backend)
    advantages, returns, stats = tk.gae(
        x["old_logp"], x["old_values"], torch.tensor([0, 2, 6]), return_stats=True, backend=backend
    )
    white = tk.whiten(advantages, stats=stats, backend=backend)
    loss, metrics = tk.ppo_loss(
        logp, logp.detach() + 0.1, white, entropy=entropy, entropy_coef=0.1, values=x["values"],
        old_values=x["old_values"], returns=returns, backend=backend,
    )  # fmt: skip
    return loss + 0.0 * metrics["ratio"]


def test_torch_compile_fullgraph(backend):
    logits, targets = random_logits(6, 40)
    x = random_ppo(6)
    gradients = []
    for run in (whole_step, torch.compile(whole_step, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        run(leaf, targets, x, backend).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_opcheck(backend):
    ops = getattr(torch.ops, tk.__name__)
    logits, targets = random_logits(3, 20)
    x = random_ppo(5)
    names = ("logp", "old_logp", "advantages", "weights", "ref_logp", "entropy", "values", "old_values", "returns")
    inputs = [x[k].requires_grad_(k in ("logp", "entropy", "values")) for k in names]
    cases = {
        "logprobs": (logits.clone().requires_grad_(), targets, 0.7, 0.0, 1.0, False),
        "ppo": (*inputs, torch.arange(5) < 3, None, 5.0, 0.2, 0.2, 3.0, 0.1, 0.1, 0.5, 0.2, 3),
        "gae": (x["old_logp"], x["old_values"], torch.tensor([0, 5]), torch.ones(1), None, None, 0.9, 1.0, True),
        "stats": (x["old_logp"], None),
    }
    for name, args in cases.items():
        library.opcheck(getattr(ops, f"{backend}_{name}").default, args)


def test_same_inputs_same_bits(backend):
    logits, targets = random_logits(4, 3001)
    upstream = torch.ones(4), torch.ones(4)
    rollouts = random_rollouts([9 * TILE // 4, 3, 3 * TILE // 4])
    for run in (
        lambda: logprobs(logits, targets, backend, upstream),
        lambda: tk.gae(**rollouts, return_stats=True, backend=backend),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
