"""The language-model head in every form that is compared: a PPO loss, a cross-entropy, and one with rows left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tppo_kernels as tk
from torch import Tensor
from tppo_kernels import native, reference
from tppo_kernels.testing import random_head, random_ppo

from benchmarks import peers
from benchmarks.measure import Case, Outputs
from benchmarks.op_cases import BACKEND_NAMES, Place, compiled, refill


def with_gradients(hidden: Tensor, weight: Tensor, loss: peers.Scalar, dtype: torch.dtype) -> Outputs:
    h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    value = loss(h, w)
    return [value, *torch.autograd.grad(value, [h, w])]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The inputs of a head, and cases on them."""

    place: Place
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    seed_of: Callable[[int], Sequence[Tensor]]

    @classmethod
    def random(cls, place: Place, actions: int, hidden_size: int, vocab: int) -> _Head:
        def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
            return random_head(actions, hidden_size, vocab, place.dtype, seed=seed, device=place.device)

        hidden, weight, targets = make(0)
        return cls(place=place, hidden=hidden, weight=weight, targets=targets, seed_of=make)

    def refresh(self, seed: int) -> None:
        refill((self.hidden, self.weight, self.targets), self.seed_of)(seed)

    def case(
        self, family: str, losses: Mapping[str, peers.Scalar | str], full: peers.Scalar, *, units: float = 6,
        baseline: str = "torch eager", refresh: Callable[[int], None] | None = None,
    ) -> Case:  # fmt: skip
        """``full``: the same loss from all logits at once. ``units``: FLOP per action, hidden unit and vocabulary entry."""
        h, w, dtype = self.hidden, self.weight, self.place.dtype
        actions, vocab = len(h), len(w)
        return Case(
            family=f"{family}, {self.place.precision}", baseline=baseline,
            sizes={"tokens": actions, "hidden": h.shape[1], "vocabulary": vocab},
            providers={
                name: loss if isinstance(loss, str) else lambda loss=loss: with_gradients(h, w, loss, dtype)
                for name, loss in losses.items()
            },
            truth=lambda: (with_gradients(h, w, full, dtype), with_gradients(h, w, full, torch.float64)),
            refresh=refresh or self.refresh,
            ideal_seconds=units * actions * h.shape[1] * vocab / self.place.ceilings.gemm,
        )  # fmt: skip


def head_case(place: Place, actions: int, hidden_size: int, vocab: int, *, entropy: bool) -> Case:
    """PPO's loss of a head: with the entropy term, the heads that differentiate it; without, also the others."""
    head = _Head.random(place, actions, hidden_size, vocab)
    targets = head.targets
    old, advantages = torch.empty(actions, device=place.device), torch.empty(actions, device=place.device)

    def refresh(seed: int, inputs: bool = True) -> None:
        if inputs:
            head.refresh(seed)
        drawn = random_ppo(actions, seed=seed, device=place.device)
        with torch.no_grad():
            exact = tk.linear_logprobs(head.hidden.float(), head.weight.float(), targets, backend="reference")[0]
        old.copy_(exact + (drawn["old_logp"] - drawn["logp"]))
        advantages.copy_(drawn["advantages"])

    refresh(0, inputs=False)
    fast = place.backends[0] if place.backends[0] != "native" or not native.missing() else "reference"

    def loss_of(logp: Tensor, h: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return tk.ppo_loss(
            logp, old, advantages, entropy=h if entropy else None, entropy_coef=0.01 if entropy else 0.0, normalizer=1.0,
            backend="reference" if logp.dtype == torch.float64 else fast,
        )  # fmt: skip

    def of(pair: peers.Pair) -> peers.Scalar:
        def loss(h: Tensor, w: Tensor) -> Tensor:
            logp, entropies = pair(h, w)
            return loss_of(logp, entropies, old.to(logp.dtype), advantages.to(logp.dtype))[0] / actions

        return loss

    def three(backend: str, chunk: int | None = None, dtype: torch.dtype | None = None) -> peers.Scalar:
        return lambda h, w: tk.linear_token_loss(
            h, w, targets, loss_of, (old, advantages), chunk_size=chunk, logits_dtype=dtype, backend=backend)[0]  # fmt: skip

    def eager(logp: Tensor, entropies: Tensor) -> Tensor:
        options: dict[str, Any] = {"entropy": entropies, "entropy_coef": 0.01} if entropy else {}
        return reference.ppo_loss(logp, old.to(logp.dtype), advantages.to(logp.dtype), **options)[0]

    def full(h: Tensor, w: Tensor) -> Tensor:
        return eager(*reference.logprobs_from_logits(h @ w.t(), targets))

    losses: dict[str, peers.Scalar | str] = {f"{n}, 3 GEMMs": loss for n, loss in place.ours(three).items()}
    four = place.ours(lambda b: of(lambda h, w: tk.linear_logprobs(h, w, targets, backend=b)))
    best = BACKEND_NAMES[place.backends[0]]
    losses[f"{best}, 4 GEMMs"] = four[best]
    if place.device == "cuda":
        losses[f"{best}, 3 GEMMs, chunks of 2048"] = three("triton", 2048)
        losses[f"{best}, 3 GEMMs, fp32 logits"] = three("triton", None, torch.float32)
    losses |= {"torch eager": full, "torch.compile": compiled(full)}
    losses |= {name: pair if isinstance(pair, str) else of(pair) for name, pair in peers.heads(targets).items()}
    for name, logp_of in peers.logp_heads(targets).items():
        if isinstance(logp_of, str) or entropy:
            losses.setdefault(name, logp_of if isinstance(logp_of, str) else peers.NO_ENTROPY)
        else:
            losses[name] = of(lambda h, w, logp_of=logp_of: _only(logp_of(h, w)))
    liger = peers.liger_policy_loss(targets, old, advantages, chunk_size=min(2048, actions))
    losses["Liger: GRPO, an action each"] = peers.NO_ENTROPY if entropy else liger
    return head.case(f"LM head + PPO loss{' with entropy bonus' if entropy else ''}", losses, full, refresh=refresh)


def _only(logp: Tensor) -> tuple[Tensor, Tensor]:
    return logp, torch.zeros_like(logp)


def cross_entropy_case(place: Place, actions: int, hidden_size: int, vocab: int) -> Case:
    """The plain cross-entropy of a head (supervised fine-tuning): a loss without an old log-probability."""
    head = _Head.random(place, actions, hidden_size, vocab)
    targets = head.targets

    def ours(backend: str) -> peers.Scalar:
        return lambda h, w: tk.linear_token_loss(h, w, targets, lambda p, _: (-p.sum(), {}), backend=backend)[0]

    def full(h: Tensor, w: Tensor) -> Tensor:
        logits = h @ w.t()
        return torch.nn.functional.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)

    losses = {
        **{f"{name}, 3 GEMMs": loss for name, loss in place.ours(ours).items()},
        "torch eager": full, "torch.compile": compiled(full), **peers.cross_entropies(targets),
    }  # fmt: skip
    return head.case("LM head + cross-entropy", losses, full)


def live_rows_case(place: Place, actions: int, hidden_size: int, vocab: int, *, live: float) -> Case:
    """A head of whose rows a share has a gradient: ``compact_rows`` off and on, at both logits' precisions."""
    head = _Head.random(place, actions, hidden_size, vocab)
    targets, mask = head.targets, torch.rand(actions, device=place.device) < live

    def masked(logp: Tensor, entropies: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.where(mask, 0.01 * entropies - logp, 0.0).sum(), {}

    def ours(compact: bool, dtype: torch.dtype) -> peers.Scalar:
        return lambda h, w: tk.linear_token_loss(
            h, w, targets, masked, (mask,), logits_dtype=dtype, compact_rows=compact, backend=place.backends[0])[0]  # fmt: skip

    def full(h: Tensor, w: Tensor) -> Tensor:
        return masked(*reference.logprobs_from_logits(h @ w.t(), targets), mask)[0] / actions

    losses: dict[str, peers.Scalar | str] = {
        f"tppo_fast: rows {'compacted' if compact else 'as they are'}{', fp32 logits' if dtype != place.dtype else ''}": ours(
            compact, dtype
        )
        for dtype in dict.fromkeys((place.dtype, torch.float32))
        for compact in (False, True)
    }
    units = 2 + 4 * live  # the logits of all rows, dX and dW of the live ones
    return head.case(
        f"head with {live:.0%} live rows", losses, full, units=units, baseline="tppo_fast: rows as they are"
    )
