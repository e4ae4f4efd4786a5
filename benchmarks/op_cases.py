"""Ops compared on any device: each of ours, eager torch, torch.compile and the peers that have one. Heads: ``head_cases``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tppo_kernels as tk
from torch import Tensor
from tppo_kernels import native, reference
from tppo_kernels.testing import random_logits, random_ppo, random_rollouts

from benchmarks import peers
from benchmarks.measure import Case, Ceilings, Outputs, Run

LEARNED = ("logp", "entropy", "values")
GAMMA, LAM = 0.99, 0.95
BACKEND_NAMES = {"reference": "tppo_fast: torch", "native": "tppo_fast: native", "triton": "tppo_fast: triton"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and in what precision."""

    device: str
    dtype: torch.dtype
    """Of logits, hidden states and weights; the vectors of GAE and the loss are fp32."""
    backends: tuple[str, ...]
    """Ours, the fastest first."""
    ceilings: Ceilings

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    def ours(self, make: Callable[[str], Run | peers.Pair | peers.Scalar]) -> dict[str, Any]:
        """``make(backend)`` for each of our backends; or why one cannot run."""
        return {
            BACKEND_NAMES[backend]: native.missing() if backend == "native" and native.missing() else make(backend)
            for backend in self.backends
        }


def cpu(ceilings: Ceilings) -> Place:
    return Place(device="cpu", dtype=torch.float32, backends=("native", "reference"), ceilings=ceilings)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For these very shapes, as a benchmark of torch.compile should."""
    return torch.compile(function, dynamic=False)


def leaves(tensors: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors, in another floating dtype if asked, that require gradients where named."""
    out = {k: t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach() for k, t in tensors.items()}
    return {k: t.requires_grad_() if k in names else t for k, t in out.items()}


def refill(tensors: Sequence[Tensor], make: Callable[[int], Sequence[Tensor]]) -> Callable[[int], None]:
    """``Case.refresh``: copies what ``make(seed)`` draws into the tensors that the providers hold."""

    def refresh(seed: int) -> None:
        for old, new in zip(tensors, make(seed), strict=True):
            old.copy_(new)

    return refresh


def rows_case(place: Place, rows: int, vocab: int, *, backward: bool) -> Case:
    """Log-probability and entropy of each row of logits."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return random_logits(rows, vocab, place.dtype, seed=seed, device=place.device)

    logits, targets = make(0)
    upstream = torch.linspace(-1, 1, rows, device=place.device), torch.linspace(0.1, 0.2, rows, device=place.device)
    scratch = logits.clone() if backward else logits

    def run(op: Callable[..., Any], x: Tensor = logits, **options: Any) -> Outputs:
        if not backward:
            with torch.no_grad():
                return op(x, targets, **options)
        x = x.detach().requires_grad_()
        out = op(x.view_as(x), targets, **options)  # a leaf itself is not overwritten
        return [*out, *torch.autograd.grad(out, x, [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)])]

    def in_place(backend: str) -> Outputs:
        scratch.copy_(logits)  # the gradient of the last call stands there; timed with it
        return run(tk.logprobs_from_logits, scratch, backend=backend, inplace_backward=True)

    providers: dict[str, Run | str] = {}
    for name, call in place.ours(lambda b: lambda: run(tk.logprobs_from_logits, backend=b)).items():
        if name != BACKEND_NAMES["reference"]:  # which is torch eager here
            providers[name] = call
    if backward:
        found = place.ours(lambda b: lambda: in_place(b))[BACKEND_NAMES[place.backends[0]]]
        providers[f"{BACKEND_NAMES[place.backends[0]]}, in place"] = found
    fast = compiled(reference.logprobs_from_logits)
    providers |= {"torch eager": lambda: run(reference.logprobs_from_logits), "torch.compile": lambda: run(fast)}
    for name, pair in peers.row_logprobs().items():
        providers[name] = pair if isinstance(pair, str) else lambda pair=pair: run(pair)
    return Case(
        family=f"log-probability + entropy, {'forward + backward' if backward else 'forward'}, {place.precision}",
        sizes={"tokens": rows, "vocabulary": vocab}, baseline="torch eager", providers=providers,
        # read; read again and write. What only reads may be faster than a copy, which is then no ceiling.
        ideal_seconds=3 * logits.element_size() * rows * vocab / place.ceilings.copy if backward else None,
        truth=lambda: (run(reference.logprobs_from_logits), run(reference.logprobs_from_logits, logits.double())),
        refresh=refill((logits, targets), make),
    )  # fmt: skip


def padded_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The loop over padded [B, T] that trainers run: one step of Python per time step."""
    after, reversed_ = rewards.new_zeros(len(rewards)), []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        after = delta + gamma * lam * after
        reversed_.append(after)
    advantages = torch.stack(reversed_[::-1], dim=1)
    return advantages, advantages + values


@functools.cache
def _powers(size: int, decay: float, like: tuple[torch.dtype, torch.device]) -> tuple[Tensor, Tensor]:
    """(decay ** (from - to) for from >= to, else 0, [from, to]; decay ** (size - to), [to])."""
    steps = torch.arange(size, dtype=like[0], device=like[1])
    behind = steps[:, None] - steps
    return torch.where(behind >= 0, decay ** behind.clamp_min(0), 0.0), decay ** (size - steps)


def blocked_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The best of plain PyTorch: one product with the powers of gamma lambda within blocks of about sqrt(T) steps, and one over
    the blocks; nothing loops in Python, and the powers are kept."""
    n, t = rewards.shape
    block = 1 << math.isqrt(t).bit_length()
    decay, like = gamma * lam, (rewards.dtype, rewards.device)
    after = torch.cat([values[:, 1:], values.new_zeros(n, 1)], 1)
    deltas = F.pad(rewards + gamma * after - values, (0, -t % block)).view(n, -1, block)
    within, to_end = _powers(block, decay, like)
    local = deltas @ within
    starts = local[..., 0] @ _powers(local.shape[1], decay**block, like)[0]  # of each block, with all later ones
    advantages = torch.addcmul(local, F.pad(starts[:, 1:], (0, 1))[..., None], to_end).view(n, -1)[:, :t]
    return advantages, advantages + values


def gae_case(place: Place, sequences: int, length: int) -> Case:
    """Sequences of one length, where the peers' rectangles hold no padding. Python loops stop at 4,096 steps."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        x = random_rollouts([length] * sequences, seed=seed, device=place.device)
        return x["rewards"], x["values"]

    rewards, values = make(0)
    cu_seqlens = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=place.device)

    def loop(gae: peers.Gae) -> Run:
        shape = sequences, length
        return lambda: [t.flatten() for t in gae(rewards.view(shape), values.view(shape), GAMMA, LAM)]

    def ours(backend: str) -> Run:
        return lambda: tk.gae(rewards, values, cu_seqlens, gamma=GAMMA, lam=LAM, backend=backend)[:2]

    loops: dict[str, peers.Gae | str] = {"padded PyTorch": padded_gae, **peers.gaes()}
    if length > 4096:
        loops = dict.fromkeys(loops, f"a Python loop of {length:,} steps takes seconds")
    loops["padded PyTorch: blocked"] = blocked_gae
    return Case(
        family="GAE, fp32", sizes={"sequences": sequences, "tokens each": length},
        baseline="padded PyTorch", refresh=refill((rewards, values), make),
        providers=place.ours(ours) | {n: gae if isinstance(gae, str) else loop(gae) for n, gae in loops.items()},
        ideal_seconds=16 * sequences * length / place.ceilings.copy,
        truth=lambda: (
            reference.gae(rewards, values, cu_seqlens, gamma=GAMMA, lam=LAM),
            reference.gae(rewards.double(), values.double(), cu_seqlens, gamma=GAMMA, lam=LAM),
        ),
    )  # fmt: skip


def ppo_case(place: Place, actions: int) -> Case:
    """Every term of the loss from log-probabilities, and its gradients; ours gives all metrics beside it."""
    names = [name for name in random_ppo(1) if name != "weights"]

    def make(seed: int) -> list[Tensor]:
        x = random_ppo(actions, seed=seed, device=place.device)
        return [x[name] for name in names]

    x = dict(zip(names, make(0), strict=True))
    options: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0}

    def run(loss_of: peers.PPOLoss, dtype: torch.dtype | None = None) -> Outputs:
        y = leaves(x, LEARNED, dtype)
        loss = loss_of(y)
        return [loss, *torch.autograd.grad(loss, [y[k] for k in LEARNED])]

    def eager(y: dict[str, Tensor]) -> Tensor:
        return reference.ppo_loss(**y, **options)[0]

    fast = compiled(eager)
    providers: dict[str, Run | str] = place.ours(
        lambda b: lambda: run(lambda y: tk.ppo_loss(**y, **options, backend=b)[0])
    )
    providers.pop(BACKEND_NAMES["reference"], None)  # which is torch eager here
    providers |= {"torch eager": lambda: run(eager), "torch.compile": lambda: run(fast)}
    for name, loss in peers.ppo_losses().items():
        providers[name] = loss if isinstance(loss, str) else lambda loss=loss: run(loss)
    return Case(
        family="PPO loss, all terms, forward + backward, fp32", sizes={"tokens": actions}, baseline="torch eager",
        providers=providers, ideal_seconds=4 * 11 * actions / place.ceilings.copy,
        truth=lambda: (run(eager), run(eager, torch.float64)), refresh=refill(list(x.values()), make),
    )  # fmt: skip
