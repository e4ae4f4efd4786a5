"""The specification: every op in plain torch, and a real backend of its own.

Notation: A actions (sampled tokens), B sequences, V vocabulary, D hidden size. All arithmetic is fp32, or fp64 when the
inputs are; fp16 and bf16 inputs are upcast once they are read. Every faster backend is tested against this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from .checks import TokenLoss, call_loss, check_ppo, check_segments, count_of, rows_at

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

IGNORED = -100
"""A target without a token, as in torch's losses: its row's results and gradient are 0."""
KLEstimator = Literal["k1", "k2", "k3"]


def _wide(x: Tensor) -> Tensor:
    """fp64 stays, everything else is computed in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def logprobs_from_logits(
    logits: Float[Tensor, "A V"],
    targets: Int[Tensor, "A"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """Log-probability of each target, and the entropy of each row's distribution, in nats.

        x = logit_scale * logits;  x = softcap * tanh(x / softcap) if softcap;  z = x / temperature
        logp_a = z[a, y_a] - logsumexp_j z[a, j]
        H_a    = logsumexp_j z[a, j] - sum_j p[a, j] z[a, j]          with 0 * -inf = 0

    A row whose target is ``IGNORED`` (-100) has logp = H = 0 and no gradient (of logits that are not finite only in a fused
    backend: here autograd makes NaN of 0 and NaN). A logit of -inf has probability 0 and adds nothing to the entropy; NaN
    propagates, and +inf makes NaN (here of another target -inf). dlogp/dz = 1[j = y] - p_j and
    dH/dz = -p_j (log p_j + H). Softcap: Gemma 2 (arXiv 2408.00118, section 2).

    ``inplace_backward`` lets a fused backend write the gradient over ``logits``: a third of the memory, when nothing
    else reads them (a second backward then fails loudly). Values and gradients are the same.
    """
    del inplace_backward  # autograd keeps the copies it needs
    x = _wide(logits)
    if logit_scale != 1.0:
        x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    z = x / temperature
    lse = z.logsumexp(-1)  # [A]
    ignored = targets == IGNORED
    logp = z.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1) - lse
    finite_z = z.masked_fill(z == -torch.inf, 0.0)
    entropy = lse - ((z - lse.unsqueeze(-1)).exp() * finite_z).sum(-1)
    return logp.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


class _Rounded(torch.autograd.Function):
    """The values of a narrower dtype in the tensor's own, with the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        del ctx
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        del ctx
        return grads[0], None


def chunk_rows(chunk_size: int | None, vocab: int, logits_dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk: as asked, else the power of two whose logits fit 64 MiB on a CPU and 1.25 GiB elsewhere.

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """
    if chunk_size is not None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size {chunk_size}: must be at least 1 (or None)")
        return chunk_size
    fits = (1 << 26 if device.type == "cpu" else 5 << 28) // (vocab * logits_dtype.itemsize)
    return min(max(1 << max(fits, 1).bit_length() - 1, 16), 8192)


def linear_logprobs(
    hidden: Float[Tensor, "A D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "A"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    compact_rows: bool | None = None,
) -> tuple[Float[Tensor, "A"], Float[Tensor, "A"]]:
    """``logprobs_from_logits(hidden @ weight.T + bias, targets)`` with at most [chunk_size, V] logits alive.

    Backward computes each chunk's logits again (4 GEMM units of 2*A*D*V FLOP in all) instead of keeping them.
    ``chunk_size`` None: see ``chunk_rows``. ``logits_dtype`` None is hidden's own; bf16 logits of size 16 to 32
    quantise log-probabilities by up to 0.0625, ``torch.float32`` does not. ``compact_rows``: whether a fused backend
    leaves rows without a gradient out of the GEMMs of dX and dW (see ``head``); here it changes nothing.

    A ``weight`` that is wider than a 16-bit ``hidden`` (fp32 master weights) is rounded to hidden's precision, and its
    gradient is not.
    """
    del compact_rows
    dtype = logits_dtype or hidden.dtype
    if hidden.dtype.itemsize == 2:
        weight = _Rounded.apply(weight, hidden.dtype)  # type: ignore[assignment]
    size, kind = chunk_rows(chunk_size, len(weight), dtype, hidden.device), hidden.device.type

    def chunk(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            logits = torch.nn.functional.linear(h.to(dtype), w.to(dtype), None if b is None else b.to(dtype))  # [C, V]
        return logprobs_from_logits(logits, y, temperature=temperature, softcap=softcap, logit_scale=logit_scale)

    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    logps, entropies = [], []
    for start in range(0, max(len(targets), 1), size):
        chosen = slice(start, start + size)
        args = (hidden[chosen], weight, bias, targets[chosen])
        if differentiable:
            logp, entropy = checkpoint(chunk, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            logp, entropy = chunk(*args)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def linear_token_loss(
    hidden: Float[Tensor, "A D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "A"],
    loss_fn: TokenLoss,
    rows: Sequence[Tensor | None] = (),
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    compact_rows: bool | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """A row-local loss of the language-model head: ``sum_a loss(logp_a, H_a, rows_a...) / normalizer``.

    ``loss_fn(logp, entropy, *rows)`` is any torch function of [C]-vectors, called once per chunk of actions; it
    returns the SUM of its rows' losses, alone or with a dict of summed metrics, tensors or numbers (added up over the
    chunks, detached). It must be row local: no mean, no whitening over the chunk, no sequence-level ratio; ``ppo_loss``
    needs ``normalizer=1.0`` there. ``rows`` are its other [A, ...] inputs (None is passed on); those that require a
    gradient (the critic's values) receive one. A fused backend refuses a loss that uses any other
    tensor that requires one: pass it in ``rows`` (a learned scalar as ``beta.expand(A)``). ``normalizer`` defaults to the
    number of targets that are not ``IGNORED`` (where ``loss_fn`` sees logp = H = 0); pass the step's global action count
    when the step is split in microbatches.

    This is the definition, at 4 GEMM units. The public op knows each row's two gradient scalars in forward and so
    needs 3.
    """
    logp, entropy = linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        chunk_size=chunk_size, logits_dtype=logits_dtype, compact_rows=compact_rows,
    )  # fmt: skip
    size = chunk_rows(chunk_size, len(weight), logits_dtype or hidden.dtype, hidden.device)
    loss, stats = logp.new_zeros(()), dict[str, Any]()
    for start in range(0, max(len(targets), 1), size):
        chosen = slice(start, start + size)
        part, metrics = call_loss(loss_fn, *rows_at((logp, entropy, *rows), chosen))
        loss = loss + part
        stats = {name: stats.get(name, 0) + value for name, value in metrics.items()}
    return loss / (count_of(targets, targets != IGNORED) if normalizer is None else normalizer), stats


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "A"],
    values: Float[Tensor, "A"],
    cu_seqlens: Int[Tensor, "B+1"],
    *,
    gamma: float = 1.0,
    lam: float | Float[Tensor, "B"] = 0.95,
    bootstrap: Float[Tensor, "B"] | None = None,
    mask: Bool[Tensor, "A"] | None = None,
    return_stats: bool = False,
) -> tuple[Tensor, ...]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) over packed actions; no gradient.

        delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1};   R_t = A_t + V_t

    ``values[a]`` is V(state before action a). After a sequence's last action V is ``bootstrap[b]`` (0 when not given:
    the episode ended) and A is 0. A masked action (``mask`` False) is transparent: its neighbours see each other
    across it, its own advantage is 0 and its return is its value. ``lam`` may differ per sequence. A NaN spreads to the
    sequence's earlier actions; with Triton only as far as (gamma lam)^k is not 0.

    Returns:
        (advantages [A], returns [A]), and with ``return_stats`` also ``whitening_stats(advantages, mask=mask)``.
    """
    if cu_seqlens.is_cpu:
        check_segments(cu_seqlens, len(rewards))
    rewards, values = _wide(rewards), _wide(values)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    lam = lam.to(rewards) if isinstance(lam, torch.Tensor) else rewards.new_full(lengths.shape, lam)
    advantages, returns = torch.zeros_like(rewards), values.clone()
    next_advantage = torch.zeros_like(lam)  # [B]
    next_value = torch.zeros_like(lam) if bootstrap is None else bootstrap.to(rewards, copy=True)  # [B]
    for t in reversed(range(int(lengths.max()) if len(lengths) else 0)):
        alive = lengths > t
        if mask is not None:
            alive = alive & mask[(starts + t).clamp_max(len(rewards) - 1)]
        a = (starts + t)[alive]
        delta = rewards[a] + gamma * next_value[alive] - values[a]
        advantage = delta + gamma * lam[alive] * next_advantage[alive]
        advantages[a], returns[a] = advantage, advantage + values[a]
        next_advantage[alive], next_value[alive] = advantage, values[a]
    if return_stats:
        return advantages, returns, whitening_stats(advantages, mask=mask)
    return advantages, returns


def whitening_stats(x: Float[Tensor, "A"], *, mask: Bool[Tensor, "A"] | None = None) -> Float[Tensor, "3"]:
    """(count, mean, sum of squared deviations) of the unmasked entries, without a host sync.

    Statistics of two shards merge exactly: see Chan, Golub and LeVeque, "Updating formulae", 1979, equation 2.1.
    """
    x = _wide(x) if mask is None else _wide(x).masked_fill(~mask, 0.0)
    kept = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    count = kept.sum()
    whole = count.clamp_min(1.0)
    mean = x.sum() / whole
    mean = mean + ((x - mean) * kept).sum() / whole  # a rounded sum is no mean: equal entries deviate by 0
    return torch.stack([count, mean, ((x - mean) * kept).square().sum()])


def whiten(
    x: Float[Tensor, "A"],
    *,
    mask: Bool[Tensor, "A"] | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    stats: Float[Tensor, "3"] | None = None,
) -> Float[Tensor, "A"]:
    """(x - mean) / sqrt(var + eps) with the unbiased variance, over the unmasked entries; masked entries become 0.

    With ``shift_mean=False`` the mean is added back: only the scale changes. Fewer than two entries have variance 0.
    ``stats`` are those of ``whitening_stats`` (or ``gae(..., return_stats=True)``) when they are known already.
    """
    count, mean, squares = (whitening_stats(x, mask=mask) if stats is None else stats).unbind()
    x = _wide(x) if mask is None else _wide(x).masked_fill(~mask, 0.0)  # no NaN of theirs in a gradient
    out = (x - mean) * torch.rsqrt(squares / (count - 1.0).clamp_min(1.0) + eps)
    if not shift_mean:
        out = out + mean
    return out if mask is None else out.masked_fill(~mask, 0.0)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: KLEstimator) -> Tensor:
    """Per-action estimate of KL(pi || ref) from samples of pi (Schulman, "Approximating KL Divergence", 2020).

    With d = logp - ref_logp:  k1 = d;  k2 = d^2 / 2;  k3 = exp(-d) - 1 + d. As a term of a loss k1 pulls nowhere: its gradient
    is dlogp whatever ref_logp is, and 0 in expectation. Take k2 or k3 there.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl estimator {kind!r}: choose k1, k2 or k3")


def ppo_loss(
    logp: Float[Tensor, "A"],
    old_logp: Float[Tensor, "A"],
    advantages: Float[Tensor, "A"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Float[Tensor, "A"] | None = None,
    ref_logp: Float[Tensor, "A"] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy: Float[Tensor, "A"] | None = None,
    entropy_coef: float = 0.0,
    values: Float[Tensor, "A"] | None = None,
    old_values: Float[Tensor, "A"] | None = None,
    returns: Float[Tensor, "A"] | None = None,
    value_coef: float = 0.5,
    value_clip: float | None = 0.2,
    mask: Bool[Tensor, "A"] | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The clipped PPO objective with every optional term, summed over actions and divided once by ``normalizer``.

        rho    = exp(logp - old_logp)
        policy = -w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)           PPO, arXiv 1707.06347, eq. 7
        policy = min(policy, -w dual_clip A) where A < 0                           dual clip, arXiv 1912.09729, eq. 5
        value  = 0.5 max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2)
        loss   = sum(policy + value_coef value + kl_coef KL(logp, ref_logp) - entropy_coef H) / normalizer

    ``clip_low != clip_high`` is DAPO's clip-higher (arXiv 2503.14476). ``weights`` are (truncated) importance weights
    of the behaviour policy and scale the policy term alone. An action whose ``mask`` is False adds nothing to the loss,
    a metric or a gradient, whatever its entries are. ``normalizer`` defaults to the number of unmasked actions; pass the
    optimizer step's global action count when the step is split in microbatches, so that their losses add up. The value
    term needs ``values`` and ``returns`` (and ``old_values`` unless ``value_clip`` is None).

    Returns:
        The scalar loss, and detached metrics that are SUMS over the unmasked actions (divide by the count yourself):
        ``policy_loss value_loss kl_loss entropy ratio ratio_sq approx_kl clip_low clip_high dual_clip value_clip``.

    Raises:
        ValueError: a coefficient is set whose tensor is missing, dual_clip is not above 1, or ``normalizer`` is left out
            inside ``linear_token_loss``, where A would be the rows of one chunk.
    """
    check_ppo(
        clip_low, clip_high, dual_clip, ref_logp, kl_coef, kl_estimator, entropy, entropy_coef, values, old_values,
        returns, value_clip, normalizer,
    )  # fmt: skip
    count = count_of(logp, mask) if normalizer is None else normalizer
    if mask is not None:  # 0 makes every term 0, and the ratio 1
        logp, old_logp, advantages = (x.masked_fill(~mask, 0.0) for x in (logp, old_logp, advantages))
        weights, ref_logp, entropy, values, old_values, returns = (
            None if x is None else x.masked_fill(~mask, 0.0)
            for x in (weights, ref_logp, entropy, values, old_values, returns)
        )
    logp, old_logp, advantages = _wide(logp), _wide(old_logp), _wide(advantages)
    zero = logp.new_zeros(())

    log_ratio = logp - old_logp
    low, high = 1.0 - clip_low, 1.0 + clip_high
    with torch.no_grad():
        ratio = log_ratio.exp()  # [A]
        is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
        clipped, dual = is_low | is_high, torch.zeros_like(is_low)
        if dual_clip is not None:
            dual = (advantages < 0) & (-ratio.clamp_min(low) * advantages > -dual_clip * advantages)
            clipped = clipped | dual
    # What is clipped is a constant for exp too: its gradient would be 0 times an infinite ratio.
    ratio = torch.where(clipped, log_ratio.detach(), log_ratio).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual_clip is not None:
        policy = torch.where(dual, -dual_clip * advantages, policy)
    if weights is not None:
        policy = policy * weights
    loss = policy.sum()

    value_loss, value_clipped = zero, zero
    if values is not None and returns is not None:
        error = (_wide(values) - returns) ** 2
        if value_clip is not None and old_values is not None:
            near = old_values + (_wide(values) - old_values).clamp(-value_clip, value_clip)
            error_near = (near - returns) ** 2
            value_clipped = ((error_near > error) & ((_wide(values) - old_values).abs() > value_clip)).sum()
            error = torch.maximum(error, error_near)
        value_loss = 0.5 * error.sum()
        loss = loss + value_coef * value_loss
    kl = zero
    if ref_logp is not None:
        kl = kl_estimate(logp, _wide(ref_logp), kl_estimator).sum()
        if kl_coef:
            loss = loss + kl_coef * kl
    entropy_sum = zero if entropy is None else _wide(entropy).sum()
    if entropy_coef:
        loss = loss - entropy_coef * entropy_sum

    with torch.no_grad():
        ratio = ratio if mask is None else ratio.masked_fill(~mask, 0.0)
        metrics = {
            "policy_loss": policy.sum(),
            "value_loss": value_loss,
            "kl_loss": kl,
            "entropy": entropy_sum,
            "ratio": ratio.sum(),
            "ratio_sq": (ratio * ratio).sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
            "clip_low": is_low.sum(),
            "clip_high": is_high.sum(),
            "dual_clip": dual.sum(),
            "value_clip": value_clipped,
        }
        metrics = {name: value.detach().to(logp.dtype) for name, value in metrics.items()}
    return loss / count, metrics
