"""``ppo_loss`` of a fused backend over every term, against the specification: one tolerance rule, memory full of NaN."""

from __future__ import annotations

import pytest
import torch
import tppo_kernels as tk
from tppo_kernels.testing import assert_close, poisoned, poisoned_memory, random_ppo

TERMS = [
    pytest.param((), {}, id="policy"),
    pytest.param(("weights",), {"dual_clip": 1.5, "clip_high": 0.3}, id="weights-dual-clip"),
    pytest.param(("ref_logp",), {"kl_coef": 0.1, "kl_estimator": "k1"}, id="k1"),
    pytest.param(("ref_logp",), {"kl_coef": 0.1, "kl_estimator": "k2"}, id="k2"),
    pytest.param(("ref_logp", "entropy"), {"kl_coef": 0.1, "entropy_coef": 0.01}, id="k3-entropy"),
    pytest.param(("ref_logp", "entropy"), {}, id="metrics-alone"),
    pytest.param(("values", "returns"), {"value_clip": None}, id="value"),
    pytest.param(("values", "returns", "old_values"), {"value_clip": 0.2}, id="clipped-value"),
    pytest.param(
        ("weights", "ref_logp", "entropy", "values", "old_values", "returns"),
        {"kl_coef": 0.2, "entropy_coef": 0.02, "dual_clip": 2.0, "normalizer": 77.0},
        id="everything",
    ),
]


def ppo(x, terms, backend, upstream=1.0, mask=None, **options):
    """(loss, its metrics, and the gradient of every input that has one, at the unmasked actions)."""
    x = {k: x[k].detach().clone() for k in ("logp", "old_logp", "advantages", *terms)}
    learned = [x[k].requires_grad_() for k in ("logp", "entropy", "values") if k in x]
    loss, metrics = tk.ppo_loss(**x, mask=mask, backend=backend, **options)
    grads = torch.autograd.grad(loss, learned, torch.tensor(upstream, dtype=loss.dtype), allow_unused=True)
    grads = [g for g in grads if g is not None]
    if mask is not None:
        assert not any(g[~mask].any() for g in grads)
        grads = [g[mask] for g in grads]
    return [loss, *(metrics[k] for k in sorted(metrics)), *(g for g in grads if g.any())]


@pytest.mark.parametrize("actions", [0, 1, 33, 5000], ids=lambda n: f"{n}-actions")
@pytest.mark.parametrize(("terms", "options"), TERMS)
def test_ppo_loss(terms, options, actions, backend):
    x = random_ppo(actions)
    upstream = -1.5
    with poisoned_memory():
        got = ppo({k: poisoned(t) for k, t in x.items()}, terms, backend, upstream, **options)
    wide = {k: t.double() for k, t in x.items()}
    eager, truth = (ppo(y, terms, "reference", upstream, **options) for y in (x, wide))
    assert_close(got, eager, truth, "loss, metrics, gradients")


@pytest.mark.parametrize("kept", [0, 1, 5, 1500], ids=lambda n: f"{n}-kept")
@pytest.mark.parametrize(("terms", "options"), TERMS)
def test_ppo_of_masked_actions(terms, options, kept, backend):
    """Exactly what the unmasked actions give alone, whatever the others hold, and no gradient for those."""
    x = random_ppo(2100)
    mask = torch.zeros(2100, dtype=torch.bool)
    mask[torch.randperm(2100, generator=torch.Generator().manual_seed(0))[:kept]] = True
    dirty = {k: t.masked_fill(~mask, torch.nan) for k, t in x.items()}

    with poisoned_memory():
        got = ppo({k: poisoned(t) for k, t in dirty.items()}, terms, backend, mask=poisoned(mask), **options)
    alone = {k: t[mask] for k, t in x.items()}
    wide = {k: t.double() for k, t in alone.items()}
    eager, truth = (ppo(y, terms, "reference", **options) for y in (alone, wide))
    assert_close(got, eager, truth, "loss, metrics, gradients")
    own = ppo(dirty, terms, "reference", mask=mask, **options)
    assert_close(own, eager, truth, "the reference's own")


def test_ppo_normalizer_may_be_a_tensor(backend):
    x = random_ppo(50)
    number = ppo(x, ("entropy",), backend, 1.0, entropy_coef=0.1, normalizer=200.0)
    tensor = ppo(x, ("entropy",), backend, 1.0, entropy_coef=0.1, normalizer=torch.tensor(200.0))
    assert_close(tensor, number, [t.double() for t in number])


def test_ppo_half_precision_gradient_has_the_input_dtype(backend):
    x = random_ppo(50)
    logp = x["logp"].bfloat16().requires_grad_()
    loss, _ = tk.ppo_loss(logp, x["old_logp"], x["advantages"], backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logp.grad is not None
    assert logp.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("log_ratio", [torch.nan, torch.inf, 100.0, -torch.inf])
def test_ppo_of_an_exploded_ratio(log_ratio, backend):
    """NaN and infinity show in the loss and the ratio, exactly as in the reference."""
    logp, zeros = torch.tensor([log_ratio, 0.0]), torch.zeros(2)
    mine, truth = (tk.ppo_loss(logp, zeros, -torch.ones(2), backend=b) for b in (backend, "reference"))
    assert_close(mine[0], truth[0], truth[0].double())
    assert_close(mine[1]["ratio"], truth[1]["ratio"], truth[1]["ratio"].double())


@pytest.mark.parametrize(("log_ratio", "advantage", "options"), [(100.0, 1.0, {}), (1e3, -1.0, {"dual_clip": 3.0})])
def test_ppo_a_clipped_ratio_has_no_gradient_however_large(log_ratio, advantage, options, backend):
    for name in (backend, "reference"):
        logp = torch.tensor([log_ratio, 0.0], requires_grad=True)
        loss, _ = tk.ppo_loss(logp, torch.zeros(2), torch.full((2,), advantage), backend=name, **options)
        loss.backward()
        assert logp.grad.tolist() == [0.0, -advantage / 2]


@pytest.mark.parametrize("name", ["values", "old_values", "returns"])
@pytest.mark.parametrize("value_clip", [None, 0.2])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_ppo_of_odd_values(odd, value_clip, name, backend):
    """What is not finite shows in the loss, exactly as in the reference."""
    x = random_ppo(40)
    x["old_values"] = torch.where(torch.arange(40) % 2 == 0, x["values"], x["old_values"])  # inside of the clip
    for at in (3, 4):
        y = {k: x[k].clone() for k in ("logp", "old_logp", "advantages", "values", "old_values", "returns")}
        y[name][at] = odd
        mine, truth = (tk.ppo_loss(**y, value_clip=value_clip, backend=b) for b in (backend, "reference"))
        for a, b in ((mine[0], truth[0]), (mine[1]["value_loss"], truth[1]["value_loss"])):
            assert_close(a, b, b.double())


@pytest.mark.parametrize("gap", [0.01, -0.4, 100.0, -100.0, torch.inf, -torch.inf])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_ppo_far_from_its_reference_policy(kind, kl_coef, gap, backend):
    """What one estimator cannot represent does not show in another, nor in a gradient without a KL term."""
    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        logp = torch.tensor([-1.5, -1.0], dtype=dtype)
        ref = logp - torch.tensor([gap, -0.1], dtype=dtype)
        learned = logp.clone().requires_grad_()
        loss, metrics = tk.ppo_loss(
            learned, logp, torch.ones_like(logp), ref_logp=ref, kl_coef=kl_coef, kl_estimator=kind, backend=name
        )
        loss.backward()
        found.append(
            [x.to(torch.float32).to(dtype) for x in (loss, metrics["kl_loss"], learned.grad)]
        )  # exp(100) is infinite
    assert_close(*found)


def test_ppo_has_no_second_derivative(backend):
    x = random_ppo(4)
    logp = x["logp"].requires_grad_()
    loss, _ = tk.ppo_loss(logp, x["old_logp"], x["advantages"], backend=backend)
    with pytest.raises(RuntimeError, match="ppo_loss has no second derivative here: use backend='reference'"):
        torch.autograd.grad(loss, logp, create_graph=True)


def test_ppo_normalizer_of_zero_is_infinite(backend):
    x = random_ppo(4)
    losses = [
        tk.ppo_loss(
            x["logp"], x["old_logp"], x["advantages"], entropy=x["entropy"], entropy_coef=0.1,
            normalizer=torch.zeros(()) if name == "reference" else 0.0, backend=name,
        )[0]
        for name in (backend, "reference")
    ]  # fmt: skip
    assert torch.equal(*losses)
    assert losses[0].isinf()


def test_ppo_boundary_ratios_count_as_in_the_reference(backend):
    ratios = torch.tensor([0.8, 1.2, 0.7999, 1.2001, 1.0, 0.5, 2.0]).log()
    x = {"logp": ratios, "old_logp": torch.zeros(7), "advantages": torch.tensor([1.0, -1, -1, 1, 0, -2, 2])}
    mine, eager, truth = (
        ppo(y, (), b, 1.0)
        for y, b in [(x, backend), (x, "reference"), ({k: t.double() for k, t in x.items()}, "reference")]
    )
    assert_close(mine, eager, truth)


def test_ppo_refuses_a_gradient_it_would_drop(backend):
    x = random_ppo(3)
    with pytest.raises(ValueError, match="old_logp requires a gradient"):
        tk.ppo_loss(x["logp"], x["old_logp"].requires_grad_(), x["advantages"], backend=backend)
    divisor = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="normalizer requires a gradient"):
        tk.ppo_loss(x["logp"], x["logp"], x["advantages"], normalizer=divisor, backend=backend)


def test_compiled_once_for_every_batch_size_and_normalizer(backend):
    """A count that is a number of the graph would compile each batch size, and stop at torch's limit of 8."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    for options in (lambda _: {}, lambda n: {"normalizer": 3.0 * n}, lambda n: {"mask": torch.arange(n) < 5}):
        torch._dynamo.reset()
        graphs.clear()
        run = torch.compile(
            lambda x, extra: tk.ppo_loss(x["logp"], x["old_logp"], x["advantages"], backend=backend, **extra)[0],
            fullgraph=True, backend=count,
        )  # fmt: skip
        for n in range(10, 32, 2):
            x = random_ppo(n)
            eager, _ = tk.ppo_loss(x["logp"], x["old_logp"], x["advantages"], backend=backend, **options(n))
            torch.testing.assert_close(run(x, options(n)), eager)
        assert len(graphs) <= 3


def test_ppo_same_inputs_same_bits(backend):
    x, options = random_ppo(5000), {"entropy_coef": 0.1, "kl_coef": 0.1}
    runs = (ppo(x, ("entropy", "ref_logp"), backend, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
