"""What ``gpu_check`` times: each of our ops against eager torch, torch.compile and its peers, on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import tppo_kernels as tk
from torch import Tensor
from tppo_kernels import reference
from tppo_kernels.testing import random_head, random_logits, random_ppo, random_rollouts

from benchmarks import peers
from benchmarks.bench_ops import Case, Outputs, Run, leaves, padded_gae
from benchmarks.gate import LEARNED, ppo_run


def rows_case(device: str, backend: str | None, rows: int, vocab: int, copy: float, *, backward: bool) -> Case:
    logits, targets = random_logits(rows, vocab, torch.bfloat16, device=device)
    selective, entropies = (
        peers.peer("trl.trainer.utils", n) for n in ("selective_log_softmax", "entropy_from_logits")
    )
    compiled = torch.compile(reference.logprobs_from_logits)

    def run(op: Callable[..., Any], x: Tensor = logits) -> Outputs:
        if not backward:
            with torch.no_grad():
                return op(x, targets)
        x = x.detach().requires_grad_()
        out = op(x, targets)
        return [*out, *torch.autograd.grad([o.sum() for o in out], x)]

    providers: dict[str, Run] = {
        "tppo": lambda: run(lambda x, y: tk.logprobs_from_logits(x, y, backend=backend)),
        "eager": lambda: run(reference.logprobs_from_logits),
        "torch.compile": lambda: run(compiled),
    }
    if selective and entropies:
        providers["TRL"] = lambda: run(lambda x, y: (selective(x.float(), y), entropies(x.float())))
    passes = 3 if backward else 1  # read; read again and write
    return Case(
        name=f"logprob + entropy, {'forward + backward' if backward else 'forward'}, [{rows}, {vocab}] bf16",
        baseline="eager", ours=("tppo",), providers=providers, ideal_seconds=2 * passes * rows * vocab / copy,
        truth=lambda: (run(reference.logprobs_from_logits), run(reference.logprobs_from_logits, logits.double())),
    )  # fmt: skip


def _with_gradients(hidden: Tensor, weight: Tensor, loss: peers.Scalar, dtype: torch.dtype = torch.bfloat16) -> Outputs:
    h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    value = loss(h, w)
    return [value, *torch.autograd.grad(value, [h, w])]


def head_case(
    device: str, backend: str | None, actions: int, hidden_size: int, vocab: int, gemm: float, *, entropy: bool
) -> Case:
    """PPO's loss of a head: with the entropy term, the heads that differentiate it; without, also the others."""
    hidden, weight, targets = random_head(actions, hidden_size, vocab, torch.bfloat16, device=device)
    advantages = random_ppo(actions, device=device)["advantages"]

    def loss_of(logp: Tensor, h: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return tk.ppo_loss(
            logp, old, advantages, entropy=h if entropy else None, entropy_coef=0.01 if entropy else 0.0, normalizer=1.0,
            backend="reference" if logp.dtype == torch.float64 else backend,
        )  # fmt: skip

    with torch.no_grad():
        exact = tk.linear_logprobs(hidden.float(), weight.float(), targets, backend="reference")[0]
        rows = exact + 0.2 * torch.randn_like(exact), advantages

    def of(pair: peers.Pair) -> peers.Scalar:
        def loss(h: Tensor, w: Tensor) -> Tensor:
            logp, entropies = pair(h, w)
            return loss_of(logp, entropies, *(r.to(logp.dtype) for r in rows))[0] / actions

        return loss

    def ours(chunk: int | None, dtype: torch.dtype) -> peers.Scalar:
        return lambda h, w: tk.linear_token_loss(
            h, w, targets, loss_of, rows, chunk_size=chunk, logits_dtype=dtype, backend=backend)[0]  # fmt: skip

    full = of(lambda h, w: reference.logprobs_from_logits(h @ w.t(), targets))
    losses: dict[str, peers.Scalar] = {
        "tppo, 3 units": ours(None, torch.bfloat16),
        "tppo, 3 units, chunks of 2048": ours(2048, torch.bfloat16),
        "tppo, 3 units, fp32 logits": ours(None, torch.float32),
        "tppo, 4 units": of(lambda h, w: tk.linear_logprobs(h, w, targets, backend=backend)),
        "eager": full,
        "torch.compile": torch.compile(full),
    }
    losses |= {name: of(pair) for name, pair in peers.heads(targets).items()}
    if not entropy:
        for name, logp_of in peers.logp_heads(targets).items():
            losses[name] = of(lambda h, w, logp_of=logp_of: _only(logp_of(h, w)))
        if liger := peers.liger_policy_loss(targets, *rows, chunk_size=min(2048, actions)):
            losses["Liger GRPO, an action each"] = liger
    names = tuple(name for name in losses if name.startswith("tppo"))
    return Case(
        name=f"PPO loss of a head{', entropy term' if entropy else ''}, [{actions} x {hidden_size}] x {vocab} bf16",
        baseline="eager", ours=names, ideal_seconds=6 * actions * hidden_size * vocab / gemm,
        providers={n: lambda loss=loss: _with_gradients(hidden, weight, loss) for n, loss in losses.items()},
        truth=lambda: (_with_gradients(hidden, weight, full), _with_gradients(hidden, weight, full, torch.float64)),
    )  # fmt: skip


def cross_entropy_case(
    device: str, backend: str | None, actions: int, hidden_size: int, vocab: int, gemm: float
) -> Case:
    """The plain cross-entropy of a head (supervised fine-tuning): a loss without an old log-probability."""
    hidden, weight, targets = random_head(actions, hidden_size, vocab, torch.bfloat16, device=device)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return tk.linear_token_loss(h, w, targets, lambda logp, _: (-logp.sum(), {}), backend=backend)[0]

    def full(h: Tensor, w: Tensor) -> Tensor:
        logits = h @ w.t()
        return torch.nn.functional.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)

    losses = {
        "tppo, 3 units": ours,
        "eager": full,
        "torch.compile": torch.compile(full),
        **peers.cross_entropies(targets),
    }
    return Case(
        name=f"cross-entropy of a head, [{actions} x {hidden_size}] x {vocab} bf16", baseline="eager",
        ours=("tppo, 3 units",), ideal_seconds=6 * actions * hidden_size * vocab / gemm,
        providers={n: lambda loss=loss: _with_gradients(hidden, weight, loss) for n, loss in losses.items()},
        truth=lambda: (_with_gradients(hidden, weight, full), _with_gradients(hidden, weight, full, torch.float64)),
    )  # fmt: skip


def live_rows_case(
    device: str, backend: str | None, actions: int, hidden_size: int, vocab: int, gemm: float, *, live: float
) -> Case:
    """A head of whose rows a share has a gradient: ``compact_rows`` off and on, at both logits' precisions."""
    hidden, weight, targets = random_head(actions, hidden_size, vocab, torch.bfloat16, device=device)
    mask = torch.rand(actions, device=device) < live

    def masked(logp: Tensor, entropies: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.where(mask, 0.01 * entropies - logp, 0.0).sum(), {}

    def ours(compact: bool, dtype: torch.dtype) -> peers.Scalar:
        return lambda h, w: tk.linear_token_loss(
            h, w, targets, masked, (mask,), logits_dtype=dtype, compact_rows=compact, backend=backend)[0]  # fmt: skip

    def full(h: Tensor, w: Tensor) -> Tensor:
        return masked(*reference.logprobs_from_logits(h @ w.t(), targets), mask)[0] / actions

    losses: dict[str, peers.Scalar] = {
        f"tppo, rows {'compacted' if compact else 'as they are'}{', fp32 logits' if dtype == torch.float32 else ''}": ours(
            compact, dtype
        )
        for dtype in (torch.bfloat16, torch.float32)
        for compact in (False, True)
    }
    units = 2 + 4 * live  # the logits of all rows, dX and dW of the live ones
    return Case(
        name=f"head with {live:.0%} live rows, [{actions} x {hidden_size}] x {vocab} bf16",
        baseline="tppo, rows as they are", ours=tuple(losses), ideal_seconds=units * actions * hidden_size * vocab / gemm,
        providers={n: lambda loss=loss: _with_gradients(hidden, weight, loss) for n, loss in losses.items()},
        truth=lambda: (_with_gradients(hidden, weight, full), _with_gradients(hidden, weight, full, torch.float64)),
    )  # fmt: skip


def _only(logp: Tensor) -> tuple[Tensor, Tensor]:
    return logp, torch.zeros_like(logp)


def gae_case(device: str, backend: str | None, lengths: list[int], copy: float) -> Case:
    x = random_rollouts(lengths, device=device)
    packed = x["rewards"], x["values"], x["cu_seqlens"]
    providers: dict[str, Run] = {"tppo": lambda: tk.gae(*packed, gamma=0.99, backend=backend)[:2]}
    if len(set(lengths)) == 1 and lengths[0] <= 4096:
        square = packed[0].view(len(lengths), -1), packed[1].view(len(lengths), -1)
        providers["padded loop"] = lambda: [t.flatten() for t in padded_gae(*square, 0.99, 0.95)]
        if verl := peers.verl_gae(lengths, *packed[:2]):
            providers["verl"] = verl
    wide = packed[0].double(), packed[1].double(), packed[2]
    return Case(
        name=f"GAE, {len(lengths)} sequences, {sum(lengths)} actions", ours=("tppo",),
        baseline="padded loop" if "padded loop" in providers else "tppo", providers=providers,
        ideal_seconds=16 * sum(lengths) / copy,
        truth=lambda: (reference.gae(*packed, gamma=0.99), reference.gae(*wide, gamma=0.99)),
    )  # fmt: skip


def ppo_case(device: str, backend: str | None, actions: int, copy: float) -> Case:
    run = ppo_run(random_ppo(actions, device=device))
    compiled = torch.compile(reference.ppo_loss)
    x = random_ppo(actions, device=device)

    def compiled_run() -> Outputs:
        y: dict[str, Any] = leaves(x, LEARNED)
        loss, metrics = compiled(**y, kl_coef=0.1, entropy_coef=0.01, dual_clip=2.0)
        return [loss, *metrics.values(), *torch.autograd.grad(loss, [y[k] for k in LEARNED])]

    return Case(
        name=f"PPO loss of every term, metrics and gradients, {actions} actions", baseline="eager", ours=("tppo", "eager"),
        providers={"tppo": lambda: run(backend, None), "eager": lambda: run("reference", None), "torch.compile": compiled_run},
        ideal_seconds=4 * 11 * actions / copy, truth=lambda: (run("reference", None), run("reference", torch.float64)),
    )  # fmt: skip


Builder = Callable[[bool], Case]
"""small -> the case: with few rows for the gate, or in full."""


def plan(device: str, backend: str | None, copy: float, gemm: float, *, dry: bool) -> list[Builder]:
    heads = [(16, 300)] if dry else [(2048, 151_936), (4096, 128_256)]
    full_rows = 32 if dry else 16_384
    segments = [[512] * 4, [2000]] if dry else [[512] * 2048, [16_384] * 64, [1 << 20]]
    vocab, actions = heads[0][1], 5000 if dry else 1 << 20

    def rows(small: bool) -> int:
        return min(64, full_rows) if small else full_rows

    def head(case: Callable[..., Case], d: int, v: int, **options: Any) -> Builder:
        return lambda small: case(device, backend, 4 * rows(True) if small else full_rows, d, v, gemm, **options)

    plans: list[Builder] = [head(head_case, d, v, entropy=entropy) for d, v in heads for entropy in (True, False)]
    plans += [head(live_rows_case, *heads[0], live=share) for share in (1.0, 0.5, 0.1)]
    plans += [head(cross_entropy_case, *heads[0])]
    plans += [
        lambda small, b=b: rows_case(device, backend, rows(small), vocab, copy, backward=b) for b in (False, True)
    ]
    plans += [
        lambda small, s=s: gae_case(device, backend, [min(s[0], 3000)] * 2 if small else s, copy) for s in segments
    ]
    return [*plans, lambda small: ppo_case(device, backend, 5000 if small else actions, copy)]
