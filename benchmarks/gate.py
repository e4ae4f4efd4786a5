"""Our ops on one device against the specification: what must be green before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import tppo_kernels as tk
from torch import Tensor
from tppo_kernels import head
from tppo_kernels.testing import close, random_head, random_logits, random_ppo, random_rollouts

from benchmarks.measure import Outputs
from benchmarks.op_cases import LEARNED, leaves
from tppo_fast import attention

FAR_ROWS, FAR_VOCAB = 14_200, 151_936
"""A * V passes 2^31."""


def check_step(device: str, backend: str | None) -> list[str]:
    """What is wrong on this device with that of ours which a PPO step stands on: one sentence each."""
    if problems := _mixed_gemm(device):
        return problems
    hidden, weight, targets = random_head(300, 64, 5003, device=device)
    of_head = _loss_of_head(hidden, weight, targets, random_ppo(300, device=device))
    problems = _disagreements("linear_token_loss", of_head, backend)
    return problems + _first_ratio(device, backend) + _packed_attention(device)


def check_everything(device: str, backend: str | None, *, dry: bool) -> list[str]:
    """What is wrong with any of our ops on this device: one sentence each."""
    problems = check_step(device, backend)

    def expect(what: str, runs: Callable[[str | None, torch.dtype | None], Outputs]) -> None:
        problems.extend(_disagreements(what, runs, backend))

    for rows, vocab in [(1, 1), (7, 17), (3, 32_003), (5, 50_257), (4 if dry else 64, 129_920)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for options in ({}, {"softcap": 20.0, "temperature": 0.7}):
                logits, targets = random_logits(rows, vocab, dtype, device=device)
                expect(f"logprobs {rows} x {vocab} {dtype} {options}", _logprobs(logits, targets, options))
    for lengths in ([1], [0, 3, 0], [1] * 5000, [300, 1, 2500, 70], [8000 if not dry else 1500]):
        for names in ((), ("mask", "bootstrap", "lam")):
            expect(f"gae {lengths[:4]} {names}", _gae(random_rollouts(lengths, device=device), names))
    for actions in (1, 1025, 100_000):
        expect(f"ppo {actions}", _ppo(random_ppo(actions, device=device)))
    for estimator in ("k1", "k2", "k3"):
        for kl_coef in (0.0, 0.1):
            x = random_ppo(3000, device=device)
            far = torch.arange(3000, device=device) % 7 == 0
            x["ref_logp"] = torch.where(far, x["logp"] + (100.0 if estimator != "k3" else -100.0), x["ref_logp"])
            expect(f"ppo, {estimator} x {kl_coef}, 100 nats apart", _ppo(x, kl_estimator=estimator, kl_coef=kl_coef))
    for dtype in (torch.float32, torch.bfloat16):
        for share in (1.0, 0.3, 0.0):
            hidden, weight, targets = random_head(300, 200, 5003, dtype, device=device)
            live = torch.arange(300, device=device) < share * 300
            expect(f"compacted rows, {share:.0%} live, {dtype}", _compacted(hidden, weight, targets, live.roll(7)))
    if device != "cpu":  # where the bounds are checked
        problems += _uncovered_actions(device, backend)
    return problems + ([] if dry else _far_rows(device))


def _disagreements(
    what: str, runs: Callable[[str | None, torch.dtype | None], Outputs], backend: str | None
) -> list[str]:
    """Where ``runs(backend, dtype)`` differs from the reference, or from itself when it runs again."""
    try:
        results = [runs(backend, None), runs("reference", None), runs("reference", torch.float64)]
        found = [close(*three) for three in zip(*results, strict=True)]
        again = zip(results[0], runs(backend, None), strict=True)
    except Exception as error:  # the other checks may still say more
        return [f"{what} does not run: {type(error).__name__}: {str(error)[-300:]}"]
    found += [None if torch.equal(a.nan_to_num(), b.nan_to_num()) else "other bits the second time" for a, b in again]
    return [f"{what}, tensor {i}: {problem}" for i, problem in enumerate(found) if problem]


def _mixed_gemm(device: str) -> list[str]:
    """dW's own call: fp32 += bf16^T @ bf16, with and without what was there. All heads stand on it."""
    problems = []
    dz, x = (torch.randn(300, n, device=device).bfloat16() for n in (500, 70))
    before = torch.randn(500, 70, device=device)
    for beta in (0.0, 1.0):
        out, truth = before.clone(), beta * before.double() + dz.double().t() @ x.double()
        try:
            head.product(dz.t(), x, out, beta=beta)
        except RuntimeError as error:
            problems.append(f"fp32 = bf16 @ bf16 (aten.addmm.dtype_out, beta {beta}) does not run here: {error}")
            continue
        if problem := close(out, truth.float(), truth):
            problems.append(f"fp32 = bf16 @ bf16 (aten.addmm.dtype_out, beta {beta}) is wrong: {problem}")
    if device != "cpu" and head.MIXED_GEMM is None:
        print(
            f"torch {torch.__version__} has no aten.addmm.dtype_out: operands are widened to fp32, and slow", flush=True
        )
    return problems


def _logprobs(logits: Tensor, targets: Tensor, options: dict[str, Any]) -> Callable[..., Outputs]:
    def run(backend: str | None, dtype: torch.dtype | None) -> Outputs:
        x = logits.to(dtype or logits.dtype).detach().requires_grad_()
        out = tk.logprobs_from_logits(x, targets, backend=backend, **options)
        upstream = torch.linspace(-1, 1, len(targets), device=x.device, dtype=out[0].dtype)
        return [*out, *torch.autograd.grad(out, x, [upstream, upstream])]

    return run


def _gae(x: dict[str, Tensor], names: tuple[str, ...]) -> Callable[..., Outputs]:
    def run(backend: str | None, dtype: torch.dtype | None) -> Outputs:
        y: dict[str, Any] = leaves(x, (), dtype)
        if backend == "reference":  # a Python loop of thousands of steps, which a CPU takes sooner
            y = {name: tensor.cpu() for name, tensor in y.items()}
        extra = {k: y[k] for k in names}
        return tk.gae(
            y["rewards"], y["values"], y["cu_seqlens"], gamma=0.99, return_stats=True, backend=backend, **extra
        )

    return run


def _ppo(x: dict[str, Tensor], **options: Any) -> Callable[..., Outputs]:
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 2.0, **options}

    def run(backend: str | None, dtype: torch.dtype | None) -> Outputs:
        y: dict[str, Any] = leaves(x, LEARNED, dtype)
        loss, metrics = tk.ppo_loss(**y, **options, backend=backend)
        return [loss, *metrics.values(), *torch.autograd.grad(loss, [y[k] for k in LEARNED])]

    return run


def _token_loss(logp: Tensor, entropy: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return tk.ppo_loss(logp, old, advantages, entropy=entropy, entropy_coef=0.01, normalizer=1.0, backend="reference")


def _loss_of_head(hidden: Tensor, weight: Tensor, targets: Tensor, x: dict[str, Tensor]) -> Callable[..., Outputs]:
    def run(backend: str | None, dtype: torch.dtype | None) -> Outputs:
        h, w, old, advantages = (
            t.detach().to(dtype or t.dtype) for t in (hidden, weight, x["old_logp"] - 5.0, x["advantages"])
        )
        h.requires_grad_()
        w.requires_grad_()
        loss, _ = tk.linear_token_loss(h, w, targets, _token_loss, (old, advantages), chunk_size=128, backend=backend)
        return [loss, *torch.autograd.grad(loss, [h, w])]

    return run


def _compacted(hidden: Tensor, weight: Tensor, targets: Tensor, live: Tensor) -> Callable[..., Outputs]:
    def loss_fn(logp: Tensor, entropy: Tensor, live: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.where(live, 0.1 * entropy - logp, 0.0).sum(), {}

    def run(backend: str | None, dtype: torch.dtype | None) -> Outputs:
        h, w = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight))
        loss, _ = tk.linear_token_loss(
            h, w, targets, loss_fn, (live,), chunk_size=128, compact_rows=True, backend=backend
        )
        return [loss, *torch.autograd.grad(loss, [h, w])]

    return run


def _uncovered_actions(device: str, backend: str | None) -> list[str]:
    """Actions after the last sequence have no advantage, count in no mean, and reach no other action."""
    x, covered = random_rollouts([30, 2000, 70], device=device), 2030
    problems = []
    for mask in (None, x["mask"]):
        whole, alone = (
            tk.gae(
                x["rewards"][:end], x["values"][:end], x["cu_seqlens"][:-1], gamma=0.99, return_stats=True, backend=backend,
                mask=None if mask is None else mask[:end],
            )
            for end in (None, covered)
        )  # fmt: skip
        pairs = [(whole[0][:covered], alone[0]), (whole[1][:covered], alone[1]), (whole[2], alone[2])]
        if whole[0][covered:].any() or not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs):
            problems.append(f"gae with actions of no sequence is wrong{'' if mask is None else ', masked'}")
    return problems


def _first_ratio(device: str, backend: str | None) -> list[str]:
    hidden, weight, targets = random_head(500, 128, 5003, torch.bfloat16, device=device)
    seen: list[Tensor] = []

    def loss_fn(logp: Tensor, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(logp.detach())
        return logp.sum(), {}

    with torch.no_grad():
        old, _ = tk.linear_logprobs(hidden, weight, targets, chunk_size=128, backend=backend)
    for compact in (False, True):
        tk.linear_token_loss(
            hidden.requires_grad_(), weight, targets, loss_fn, chunk_size=128, compact_rows=compact, backend=backend
        )
    return [] if torch.equal(torch.cat(seen), torch.cat([old, old])) else ["the first PPO ratio is not exactly 1"]


def _packed_attention(device: str) -> list[str]:
    """Attention with shared prompts in bf16, by flash kernels where there are any, eager and compiled, against SDPA in fp64."""
    problems = []
    flash = attention.can_use_flash(torch.device(device), True) is None
    for size, window, prefix in [
        (64, None, [-1, -1, 0, 0, 1, 1]),
        (128, None, [-1, -1, 0, 0, 1, 1]),
        (128, None, [-1] * 6),
        (128, 16, [-1] * 6),
    ]:
        for compiled in (False, True) if flash and size == 128 and window is None else (False,):
            shared = ", shared prompts" if max(prefix) >= 0 else ""
            what = f"packed attention, heads of {size}, window {window}{shared}{', compiled' * compiled}"
            try:
                off = _attention_errors(device, size, window, prefix, flash=flash, compiled=compiled)
            except Exception as error:
                problems.append(f"{what} does not run: {type(error).__name__}: {str(error)[-300:]}")
                continue
            # bf16 weights and outputs: kernels that round both, in plain torch, are off by 1.2e-2
            problems += [f"{what}, tensor {i}: off by {e:.1e} of the norm" for i, e in enumerate(off) if not e < 2e-2]
    return problems


def _attention_errors(
    device: str, size: int, window: int | None, prefix: list[int], *, flash: bool, compiled: bool
) -> list[float]:
    """Of the output and the gradients of q, k, v, relative in norm."""
    lengths, heads = [70, 130, 20, 1, 33, 64], (4, 2, 2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
    batch: Any = SimpleNamespace(token_ids=tokens, cu_seqlens=cu_seqlens, prefix=torch.tensor(prefix))
    drawn = [torch.randn(1, h, sum(lengths), size, device=device).bfloat16() for h in heads]
    upstream = torch.randn(1, sum(lengths), heads[0], size, device=device).bfloat16()
    attend: Any = attention.packed_attention

    def run(dtype: torch.dtype, call: Any, flash: bool) -> Outputs:
        inputs = [x.to(dtype).requires_grad_() for x in drawn]
        layout = attention.build_layout(batch, flash=flash)
        out, _ = call(None, *inputs, None, layout=layout, sliding_window=window)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    tried = run(torch.bfloat16, torch.compile(attend, dynamic=True) if compiled else attend, flash)
    pairs = zip(tried, run(torch.float64, attend, False), strict=True)
    return [float((got.detach().double() - truth.detach()).norm() / truth.detach().norm()) for got, truth in pairs]


def _far_rows(device: str) -> list[str]:
    """Rows beyond 2^31 entries have the values of the same rows alone."""
    logits = torch.randn(FAR_ROWS, FAR_VOCAB, dtype=torch.bfloat16, device=device)
    targets = torch.randint(FAR_VOCAB, (FAR_ROWS,), device=device)
    whole, last = tk.logprobs_from_logits(logits, targets), tk.logprobs_from_logits(logits[-64:].clone(), targets[-64:])
    same = all(torch.equal(a[-64:], b) for a, b in zip(whole, last, strict=True))
    return [] if same else ["rows beyond 2^31 entries are wrong"]
