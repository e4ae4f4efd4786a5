"""Every op of a fused backend for any shapes, strides and options that hypothesis finds, against the specification."""

from __future__ import annotations

import torch
import tppo_kernels as tk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tppo_kernels.testing import assert_close, random_head, random_logits, random_ppo, random_rollouts

FLOATS = (torch.float32, torch.float64)
any_inputs = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 3)


def check(run, backend):
    """``run(backend, dtype)`` -> tensors, under the one tolerance rule."""
    assert_close(run(backend, torch.float32), *(run("reference", dtype) for dtype in FLOATS))


def with_step(x, step):
    """The same entries, ``step`` apart in memory."""
    return x.repeat_interleave(step)[::step] if x.dim() == 1 else x


@any_inputs
@given(
    rows=st.integers(0, 4), vocab=st.integers(1, 70), step=st.sampled_from([1, 2]), transposed=st.booleans(), seed=seeds
)
def test_logprobs(backend, rows, vocab, step, transposed, seed):
    logits, targets = random_logits(rows, vocab * step, seed=seed)
    targets = with_step(targets // step, 2)  # strided, and at an odd alignment

    def run(name, dtype):
        leaf = logits.to(dtype).requires_grad_()
        x = (leaf.T.contiguous().T if transposed else leaf)[:, ::step]
        logp, entropy = tk.logprobs_from_logits(x, targets, backend=name)
        return [logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), leaf)]

    check(run, backend)


@any_inputs
@given(lengths=st.lists(st.integers(0, 40), max_size=30), gamma=st.sampled_from([0.0, 0.97, 1.0]), seed=seeds)
def test_gae(backend, lengths, gamma, seed):
    x = random_rollouts(lengths, seed=seed)

    def run(name, dtype):
        y = {k: t.to(dtype) if t.is_floating_point() else t for k, t in x.items()}
        return tk.gae(**y, gamma=gamma, return_stats=True, backend=name)

    check(run, backend)


@any_inputs
@given(count=st.integers(0, 300), step=st.sampled_from([1, 3]), masked=st.booleans(), seed=seeds)
def test_whiten(backend, count, step, masked, seed):
    x = random_ppo(count, seed=seed)
    mask = with_step(x["weights"] < 1.0, step) if masked else None

    def run(name, dtype):
        y = with_step(x["advantages"].to(dtype), step)
        return [tk.whiten(y, mask=mask, backend=name), tk.whitening_stats(y, mask=mask, backend=name)]

    check(run, backend)


OPTIONAL = ("weights", "ref_logp", "entropy", "values")
coefficients = st.sampled_from([0.0, 0.1])


@any_inputs
@given(
    actions=st.integers(0, 200), step=st.sampled_from([1, 2]), terms=st.sets(st.sampled_from(OPTIONAL)), seed=seeds,
    clips=st.tuples(st.floats(0.01, 0.5), st.floats(0.01, 0.5)), dual_clip=st.none() | st.floats(1.1, 4.0),
    kl=st.tuples(coefficients, st.sampled_from(["k1", "k2", "k3"])), entropy_coef=coefficients,
    value_clip=st.none() | st.floats(0.01, 0.5), normalizer=st.none() | st.floats(1.0, 50.0),
)  # fmt: skip
def test_ppo_loss(backend, actions, step, terms, seed, clips, dual_clip, kl, entropy_coef, value_clip, normalizer):
    x = random_ppo(actions, seed=seed)
    if "values" in terms:
        terms = terms | {"returns"} | ({"old_values"} if value_clip else set())
    options = {"clip_low": clips[0], "clip_high": clips[1], "dual_clip": dual_clip, "normalizer": normalizer}
    options |= {"kl_coef": kl[0], "kl_estimator": kl[1]} if "ref_logp" in terms else {}
    options |= {"entropy_coef": entropy_coef} if "entropy" in terms else {}
    options |= {"value_clip": value_clip} if "values" in terms else {}

    def run(name, dtype):
        y = {k: with_step(x[k].to(dtype), step) for k in ("logp", "old_logp", "advantages", *sorted(terms))}
        learned = [y[k].requires_grad_() for k in ("logp", "entropy", "values") if k in y]
        loss, metrics = tk.ppo_loss(**y, backend=name, **options)
        grads = torch.autograd.grad(loss, learned, allow_unused=True)
        return [loss, *(metrics[k] for k in sorted(metrics)), *(g for g in grads if g is not None and g.any())]

    check(run, backend)


@any_inputs
@given(
    actions=st.integers(0, 20), hidden_size=st.integers(1, 9), vocab=st.integers(1, 70), chunk_size=st.integers(1, 24),
    dead=st.booleans(), seed=seeds,
)  # fmt: skip
def test_head(backend, actions, hidden_size, vocab, chunk_size, dead, seed):
    """Log-probabilities and a loss of them, with the gradients of both; half of the rows may have none."""
    hidden, weight, targets = random_head(actions, hidden_size, vocab, seed=seed)
    scale = random_ppo(actions, seed=seed)["advantages"]
    if dead:
        scale[::2] = 0.0

    def loss_fn(logp, entropy, scale):
        return (scale * (logp + 0.1 * entropy)).square().sum(), {}  # terms of one sign: a sum that cancels has no scale

    def run(name, dtype):
        x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        rows, options = scale.to(dtype), {"chunk_size": chunk_size, "backend": name}
        logp, entropy = tk.linear_logprobs(x, w, targets, **options)
        apart = torch.autograd.grad(loss_fn(logp, entropy, rows)[0], (x, w))
        loss, _ = tk.linear_token_loss(x, w, targets, loss_fn, (rows,), **options)
        return [logp, entropy, loss, *apart, *torch.autograd.grad(loss, (x, w))]

    check(run, backend)
