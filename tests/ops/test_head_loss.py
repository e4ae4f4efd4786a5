"""What ``linear_token_loss`` asks of a loss function and its rows, and what it does where it is traced."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.utils.checkpoint
import tppo_kernels as tk
from head_support import inputs, token_loss, wide
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from tppo_kernels.testing import assert_close, poisoned_memory


def test_loss_that_is_no_sum_is_named(backend):
    x = inputs(5, torch.float32)
    with pytest.raises(ValueError, match=r"loss of shape \(5,\): return the sum"):
        tk.linear_token_loss(x["hidden"], x["weight"], x["targets"], lambda logp, _: (logp, {}), backend=backend)
    with pytest.raises(ValueError, match="chunk_size 0"):
        tk.linear_logprobs(x["hidden"], x["weight"], x["targets"], chunk_size=0, backend=backend)


@pytest.mark.parametrize("compact", [None, True, False])
def test_ignored_targets_are_as_in_cross_entropy(compact, backend, exact):
    """Mean and gradients of torch's own loss; a chunk may be ignored as a whole."""
    x = inputs(24, exact)
    x["targets"][::3] = -100
    x["targets"][8:16] = -100

    def gradients(y, name):
        leaves = [y[k].detach().requires_grad_() for k in ("hidden", "weight", "bias")]
        if name == "torch":
            logits = torch.nn.functional.linear(*leaves)
            loss = torch.nn.functional.cross_entropy(logits, y["targets"])
            return [loss, *torch.autograd.grad(loss, leaves)] * 2
        options = {"bias": leaves[2], "chunk_size": 8, "compact_rows": compact, "backend": name}
        three, _ = tk.linear_token_loss(*leaves[:2], y["targets"], lambda logp, _: -logp.sum(), **options)
        four = -tk.linear_logprobs(*leaves[:2], y["targets"], **options)[0].sum() / (y["targets"] != -100).sum()
        return [t for loss in (three, four) for t in (loss, *torch.autograd.grad(loss, leaves))]

    truth = gradients(wide(x), "torch")
    with poisoned_memory():
        got = gradients(x, backend)
    assert_close(got, gradients(x, "torch"), truth)
    assert_close(gradients(x, "reference"), gradients(x, "torch"), truth)


@pytest.mark.parametrize("made", ["leaf", "node", "itself"])
def test_a_loss_that_uses_another_learned_tensor_is_refused(made, backend):
    """Its gradient would be dropped. In rows it gets one, and without gradients nobody misses it."""
    x, beta = inputs(20, torch.float32), torch.tensor(0.3, requires_grad=True)
    used = {"leaf": beta, "node": (2 * beta).exp(), "itself": beta}[made]
    hidden = x["hidden"].requires_grad_()

    def call(loss_fn, *rows):
        return tk.linear_token_loss(hidden, x["weight"], x["targets"], loss_fn, rows, chunk_size=8, backend=backend)[0]

    def captures(logp, _):
        return used if made == "itself" else (used * logp).sum(), {}

    with pytest.raises(ValueError, match=r"requires a gradient .* is not among its arguments"):
        call(captures)
    with pytest.raises(ValueError, match=r"requires a gradient .* is not among its arguments"):
        call(lambda logp, _: (logp if len(logp) == 8 else used * logp).sum())  # in the last chunk alone
    with torch.no_grad():
        assert call(captures).isfinite()
    call(lambda logp, _, b: ((b * logp).sum(), {}), used.expand(20)).backward()
    assert beta.grad


def test_a_checkpoints_body_runs_twice_for_any_number_of_chunks(backend):
    """Forward and its repetition: each chunk's own backward unpacks what it saved from nowhere but memory."""
    x, runs = inputs(16, torch.float32), []

    def body(hidden):
        runs.append(len(hidden))
        rows = (x["old"], x["advantages"])
        return tk.linear_token_loss(
            hidden.tanh(), x["weight"], x["targets"], lambda logp, _, old, a: ((logp - old).exp() * a).sum(), rows,
            chunk_size=2, backend=backend,
        )[0]  # fmt: skip

    found = []
    for run in (body, lambda h: torch.utils.checkpoint.checkpoint(body, h, use_reentrant=False)):
        leaf = x["hidden"].clone().requires_grad_()
        found += torch.autograd.grad(run(leaf), leaf)
    assert len(runs) == 3
    assert torch.equal(*found)


def test_a_normalizer_that_would_lose_its_gradient_is_refused(backend):
    x = inputs(5, torch.float32)
    for divisor in (torch.ones((), requires_grad=True), torch.ones(5, requires_grad=True).sum()):
        with pytest.raises(ValueError, match="normalizer requires a gradient"):
            tk.linear_token_loss(
                x["hidden"], x["weight"], x["targets"], lambda logp, _: logp.sum(), normalizer=divisor, backend=backend
            )


@pytest.mark.parametrize("how", ["fused", "compiled", "reference"])
def test_a_loss_that_divides_by_a_chunks_rows_is_refused(how, backend):
    x = inputs(20, torch.float32)

    def step(hidden, **options):
        def loss_fn(logp, _, old, advantages):
            return tk.ppo_loss(logp, old, advantages, backend=backend, **options)

        rows, name = (x["old"], x["advantages"]), "reference" if how == "reference" else backend
        return tk.linear_token_loss(hidden, x["weight"], x["targets"], loss_fn, rows, chunk_size=8, backend=name)[0]

    run = torch.compile(step, backend="aot_eager") if how == "compiled" else step
    with pytest.raises(ValueError, match=r"pass normalizer=1.0 inside linear_token_loss"):
        run(x["hidden"])
    assert run(x["hidden"], normalizer=1.0).isfinite()
    assert tk.ppo_loss(x["old"], x["old"], x["advantages"], backend=backend)[0].isfinite()  # outside there is a default


def test_a_bare_loss_numbers_and_rows_of_none(backend):
    x = inputs(20, torch.float32)

    def call(loss_fn, *rows, name=backend):
        return tk.linear_token_loss(x["hidden"], x["weight"], x["targets"], loss_fn, rows, chunk_size=8, backend=name)

    for name in (backend, "reference"):
        bare = call(lambda logp, _: logp.sum(), name=name)
        full = call(lambda logp, _, none: (logp.sum(), {"rows": len(logp), "none": none is None}), None, name=name)
        assert torch.equal(bare[0], full[0])
        assert bare[1] == {}
        assert full[1]["rows"] == 20
        assert full[1]["none"]


@pytest.mark.parametrize("how", ["meta", "fake", "symbolic", "real"])
def test_shapes_alone_and_recorded_graphs(how, backend):
    """Kernels beside torch's dispatcher see no values on meta and fake tensors, and leave nothing in a recorded graph."""
    x = inputs(20, torch.float32)
    names = ("hidden", "weight", "bias", "targets", "old", "advantages", "values", "returns")

    def step(*tensors):
        y = dict(zip(names, tensors, strict=True))
        rows = [y[k] for k in ("old", "advantages", "values", "returns")]
        leaf = y["hidden"].detach().requires_grad_()
        loss, _ = tk.linear_token_loss(leaf, y["weight"], y["targets"], token_loss, rows, chunk_size=8, backend=named)
        return loss, *torch.autograd.grad(loss, leaf)

    named, given = backend, [x[k] for k in names]
    if how == "meta":
        named = None if importlib.util.find_spec("triton") else "reference"
        results = step(*(t.to("meta") for t in given))
    elif how == "fake":
        with FakeTensorMode() as mode:
            results = step(*(mode.from_tensor(t) for t in given))
    else:
        graph = make_fx(step, tracing_mode=how)(*given)
        results = graph(*(t + 1 if t.is_floating_point() else t for t in given))
        truth = step(*(t + 1 if t.is_floating_point() else t for t in given))
        torch.testing.assert_close(results, truth)
    assert [t.shape for t in results] == [(), (20, 6)]


def test_compiled_with_the_loss_in_the_graph(backend):
    x = inputs(20, torch.float32)

    def step(hidden, weight):
        rows = (x["old"], x["advantages"], x["values"], x["returns"])
        return tk.linear_token_loss(hidden, weight, x["targets"], token_loss, rows, chunk_size=8, backend=backend)[0]

    gradients = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x[k].clone().requires_grad_() for k in ("hidden", "weight")]
        run(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
