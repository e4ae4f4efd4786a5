"""What tests and benchmarks share: ONE tolerance rule, input makers, and buffers poisoned with NaN.

The rule: an implementation may be as wrong as eager torch is in the same precision, plus ``TOLERANCE[dtype]``, both
measured against the same call in fp64. It is scale free, so a gradient of 1e-6 is held as tightly as a
log-probability of 10.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""Relative to an entry's size plus the tensor's root mean square; fp32 is about 32 units in the last place."""


def _finite_error(x: Tensor, truth: Tensor) -> Tensor:
    """|x - truth| where the truth is finite, 0 elsewhere."""
    return torch.where(truth.isfinite(), (x.double() - truth).abs(), 0.0)


def close(actual: Tensor, eager: Tensor, truth: Tensor) -> str | None:
    """None when ``actual`` obeys the rule, else one sentence; ``eager`` and ``truth`` are the reference's."""
    if actual.shape != truth.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(truth.shape)}"
    actual, eager, truth = actual.detach(), eager.detach().to(actual.device), truth.detach().double().to(actual.device)
    odd = ~truth.isfinite()
    if not torch.equal(actual.double()[odd].nan_to_num(nan=7.0), truth[odd].nan_to_num(nan=7.0)):
        return f"{actual[odd][:4].tolist()} where the truth is {truth[odd][:4].tolist()}"
    if not actual[~odd].isfinite().all():
        return f"{int((~actual[~odd].isfinite()).sum())} entries are not finite where the truth is"
    if not truth.numel() or odd.all():
        return None
    scale = truth.abs() + truth[~odd].square().mean().sqrt()
    allowed = _finite_error(eager, truth).max() + TOLERANCE[actual.dtype] * scale
    excess = torch.where(odd, -torch.inf, _finite_error(actual, truth) - allowed)
    worst = int(excess.argmax())
    if excess.flatten()[worst] <= 0:
        return None
    found, wanted = actual.flatten()[worst].item(), truth.flatten()[worst].item()
    return f"entry {worst} is {found}, the truth is {wanted}: over the allowed error by {excess.max():.3g}"


def assert_close(
    actual: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    what: str = "",
) -> None:
    """Fail with the worst entry unless every tensor obeys the rule."""
    triples = [(actual, eager, truth)] if isinstance(actual, Tensor) else zip(actual, eager, truth, strict=True)
    for i, (a, e, t) in enumerate(triples):
        assert isinstance(a, Tensor)
        assert isinstance(e, Tensor)
        assert isinstance(t, Tensor)
        if problem := close(a, e, t):
            raise AssertionError(f"{what or 'tensor'} [{i}]: {problem}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` is filled with NaN (integers with their maximum), so that an unwritten entry shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills, as torch.utils.deterministic.fill_uninitialized_memory is on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def poisoned(x: Tensor, pad: int = 64) -> Tensor:
    """A copy of ``x`` inside a larger buffer of NaN (integers: their maximum): a read outside of ``x`` shows.

    The rows of a matrix are ``pad`` entries apart and the storage does not start at its allocation's alignment.
    """
    fill = torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    rows = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    buffer = torch.full((rows.shape[0] + 2, rows.shape[1] + 2 * pad - 1), fill, dtype=x.dtype, device=x.device)
    inner = buffer[1:-1, pad - 1 : pad - 1 + rows.shape[1]]
    inner.copy_(rows)
    return (inner if x.dim() > 1 else inner[0]).detach().requires_grad_(x.requires_grad)


def _generator(seed: int, device: str) -> torch.Generator:
    """On the device itself: gigabytes of logits are not made on a CPU."""
    return torch.Generator(device=device).manual_seed(seed)


def random_logits(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(logits [A, V], targets [A]) peaked like a language model's: a few large logits over a wide, negative bulk."""
    g = _generator(seed, device)
    logits = 2.0 * torch.randn(rows, vocab, generator=g, device=device) - 4.0
    targets = torch.randint(vocab, (rows,), generator=g, device=device)
    top = torch.randint(vocab, (rows, 4), generator=g, device=device)
    logits.scatter_(1, top, 10.0 * torch.rand(rows, 4, generator=g, device=device))
    likely = (
        torch.rand(rows, generator=g, device=device) < 0.5
    )  # half of the targets were likely, as sampled tokens are
    logits[likely, targets[likely]] = 9.0
    return logits.to(dtype), targets


def random_head(
    actions: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [A, D], weight [V, D], targets [A]) with logits of standard deviation about 3."""
    g = _generator(seed, device)
    hidden = torch.randn(actions, hidden_size, generator=g, device=device)
    weight = torch.randn(vocab, hidden_size, generator=g, device=device) * 3.0 / hidden_size**0.5
    targets = torch.randint(vocab, (actions,), generator=g, device=device)
    return hidden.to(dtype), weight.to(dtype), targets


def random_rollouts(
    lengths: Sequence[int], *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Packed ``rewards``, ``values`` [A], ``mask`` [A], ``lam``, ``bootstrap`` [B] and int32 ``cu_seqlens`` [B+1]."""
    g = _generator(seed, device)
    actions, sequences = sum(lengths), len(lengths)
    made = {
        "rewards": torch.randn(actions, generator=g, device=device),
        "values": torch.randn(actions, generator=g, device=device),
        "bootstrap": torch.randn(sequences, generator=g, device=device),
        "lam": torch.rand(sequences, generator=g, device=device),
    }
    made = {name: x.to(dtype) for name, x in made.items()}
    made["mask"] = torch.rand(actions, generator=g, device=device) < 0.7
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return made | {"cu_seqlens": starts.to(device, torch.int32)}


def random_ppo(
    actions: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Every [A] input of ``ppo_loss``, with ratios and values on both sides of their clips."""
    g = _generator(seed, device)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(actions, generator=g, device=device)

    logp, values = -2.0 * torch.rand(actions, generator=g, device=device), draw(1.0)
    made = {
        "logp": logp,
        "old_logp": logp + draw(0.3),
        "advantages": draw(1.0),
        "weights": torch.rand(actions, generator=g, device=device) * 2.0,
        "ref_logp": logp + draw(0.2),
        "entropy": torch.rand(actions, generator=g, device=device) * 3.0,
        "values": values,
        "old_values": values + draw(0.3),
        "returns": values + draw(1.0),
    }
    return {name: x.to(dtype) for name, x in made.items()}
