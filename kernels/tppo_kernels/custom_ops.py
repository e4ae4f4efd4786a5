"""Custom ops of torch, once for every fused backend: schemas, shapes for tracing, autograd, and the public op on top.

A backend gives plain launchers that write into tensors they are handed; this file makes custom ops of them, so that
they trace under ``torch.compile(fullgraph=True)`` and differentiate. The namespace is the package's own name: two
copies of the package (one loaded through Hugging Face ``kernels``) live in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from . import checks, reference

NAMESPACE = (__package__ or "tppo_kernels").replace(".", "_").replace("-", "_")
PPO_METRICS = (
    "policy_loss", "value_loss", "kl_loss", "entropy", "ratio", "ratio_sq", "approx_kl",
    "clip_low", "clip_high", "dual_clip", "value_clip",
)  # fmt: skip
KL_KINDS = {"k1": 1, "k2": 2, "k3": 3}
_PLAIN = library.Library(NAMESPACE, "FRAGMENT")


class LogitOptions(NamedTuple):
    """How logits become z: see ``reference.logprobs_from_logits``. ``softcap`` 0 means none."""

    temperature: float
    softcap: float
    logit_scale: float


class PpoInputs(NamedTuple):
    """The [A] vectors of ``reference.ppo_loss``; ``mask`` is bool, the others have the compute dtype."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    weights: Tensor | None
    ref_logp: Tensor | None
    entropy: Tensor | None
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    mask: Tensor | None


class PpoResults(NamedTuple):
    loss: Tensor
    """[]."""
    metrics: Tensor
    """[len(PPO_METRICS)]."""
    grad_logp: Tensor
    """[A]."""
    grad_values: Tensor
    """[A], or [0] without values."""


class PpoOptions(NamedTuple):
    """The coefficients of ``reference.ppo_loss``; infinity stands for a clip that is not used."""

    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    entropy_coef: float
    value_coef: float
    value_clip: float
    kl_estimator: int


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays, everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def define(
    name: str, schema: str, launch: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Any:
    """The custom op ``<namespace>::<name>``: ``launch`` runs it, ``fake`` gives its results' shapes."""
    made = library.custom_op(f"{NAMESPACE}::{name}", launch, mutates_args=mutates, schema=schema)
    made.register_fake(fake)
    return made


def define_plain(name: str, schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """``define`` for an op whose inputs have no gradient: without autograd's layers a small call takes two thirds as long."""
    _PLAIN.define(name + schema)
    _PLAIN.impl(name, launch, "CompositeExplicitAutograd")
    library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_PLAIN)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class LiveRows(NamedTuple):
    """The rows of a chunk that have a gradient, known to the device alone."""

    where: Tensor
    """int32 [C]: the rows in order, in the first ``number`` entries."""
    number: Tensor
    """int32 [1]."""


class RowProducts(NamedTuple):
    """The head's gradient GEMMs over live rows, without a host sync: ``dz``, ``hidden`` [C, *] and ``weight`` [V, D]."""

    find: Callable[[Tensor | None, Tensor | None], LiveRows]
    """(dL/dlogp, dL/dentropy) -> the rows where one of them is not 0."""
    d_hidden: Callable[[Tensor, Tensor, LiveRows, Tensor], None]
    """(dz, weight, live, out [C, D]): out[where] = dz[where] @ weight; other rows are left alone."""
    d_weight: Callable[[Tensor, Tensor, LiveRows, Tensor, bool], None]
    """(dz, hidden, live, out [V, D] fp32, accumulate): out (+)= dz[where]^T @ hidden[where]."""


class Rows(NamedTuple):
    """The row kernels of one backend; [A] results have the compute dtype. No autograd."""

    forward: Callable[[Tensor, Tensor, LogitOptions], tuple[Tensor, Tensor, Tensor]]
    """(logits [A, V], targets [A], options) -> (logp, entropy, lse), each [A]."""
    backward: Callable[
        [Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor | None, Tensor, LogitOptions], None
    ]
    """(logits, targets, forward's results, dL/dlogp, dL/dentropy, out [A, V], options): out may be logits itself;
    where there are ``products``, it may be narrower."""
    products: RowProducts | None = None
    """None where live rows are counted on the host."""


def logprobs_op(backend: str, rows: Rows) -> Callable[..., tuple[Tensor, Tensor]]:
    """``logprobs_from_logits`` as custom ops ``<backend>_logprobs`` and its two backwards."""
    options = "float temperature, float softcap, float logit_scale"
    saved = "Tensor targets, Tensor logp, Tensor entropy, Tensor lse, Tensor? grad_logp, Tensor? grad_entropy"

    def forward(logits, targets, temperature, softcap, logit_scale, inplace_backward):
        del inplace_backward  # for autograd below
        return rows.forward(logits, targets, LogitOptions(temperature, softcap, logit_scale))

    def forward_fake(logits, *_):
        return tuple(logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype)) for _ in range(3))

    def backward_(logits, targets, logp, entropy, lse, grad_logp, grad_entropy, *numbers):
        rows.backward(logits, targets, (logp, entropy, lse), grad_logp, grad_entropy, logits, LogitOptions(*numbers))

    def backward(logits, targets, logp, entropy, lse, grad_logp, grad_entropy, *numbers):
        out = logits.new_empty(logits.shape)
        rows.backward(logits, targets, (logp, entropy, lse), grad_logp, grad_entropy, out, LogitOptions(*numbers))
        return out

    op = define(
        f"{backend}_logprobs",
        f"(Tensor logits, Tensor targets, {options}, bool inplace_backward) -> (Tensor, Tensor, Tensor)",
        forward, forward_fake,
    )  # fmt: skip
    in_place = define(
        f"{backend}_logprobs_backward_",
        f"(Tensor(a!) logits, {saved}, {options}) -> ()",
        backward_,
        lambda *_: None,
        ("logits",),
    )
    new = define(
        f"{backend}_logprobs_backward", f"(Tensor logits, {saved}, {options}) -> Tensor",
        backward, lambda logits, *_: logits.new_empty(logits.shape),
    )  # fmt: skip

    def setup(ctx, inputs, output):
        logits, targets, *ctx.numbers, ctx.inplace = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(logits, targets, *output)

    def gradient(ctx, grad_logp, grad_entropy, _):
        logits, *saved = ctx.saved_tensors
        own = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]  # no entry that another row shares
        if not (ctx.inplace and own):
            return new(logits, *saved, grad_logp, grad_entropy, *ctx.numbers), *(None,) * 5
        refuse_second_derivative("logprobs_from_logits with inplace_backward")
        logits = logits.detach()
        in_place(logits, *saved, grad_logp, grad_entropy, *ctx.numbers)
        return logits, *(None,) * 5

    op.register_autograd(gradient, setup_context=setup)

    def logprobs_from_logits(
        logits: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
        logit_scale: float = 1.0, inplace_backward: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logp, entropy, _ = op(logits, targets, temperature, softcap or 0.0, logit_scale, inplace_backward)
        return logp, entropy

    return logprobs_from_logits


def gae_op(backend: str, launch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """``gae`` as the custom op ``<backend>_gae``.

    ``launch(rewards, values, cu_seqlens, lams, bootstrap, mask, gamma, lam, advantages, returns, stats)`` fills the last
    three. ``lams`` is None where ``lam`` serves every sequence; ``stats`` is empty where nobody asked for them.
    """

    def fake(rewards, *others):
        dtype = compute_dtype(rewards.dtype)
        empty = rewards.new_empty(rewards.shape, dtype=dtype)
        return empty, torch.empty_like(empty), rewards.new_empty(3 if others[-1] else 0, dtype=dtype)

    def run(*args):
        out = fake(*args)
        launch(*args[:-1], *out)
        return out

    schema = (
        "(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? lams, Tensor? bootstrap, Tensor? mask,"
        " float gamma, float lam, bool return_stats) -> (Tensor, Tensor, Tensor)"
    )
    op = define_plain(f"{backend}_gae", schema, run, fake)

    def gae(
        rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float | Tensor = 0.95,
        bootstrap: Tensor | None = None, mask: Tensor | None = None, return_stats: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype = torch.promote_types(compute_dtype(rewards.dtype), compute_dtype(values.dtype))

        def vector(x: Tensor) -> Tensor:
            return x.detach().to(dtype).contiguous()

        one, lams = (1.0, vector(lam)) if isinstance(lam, Tensor) else (lam, None)
        out = op(
            vector(rewards), vector(values), cu_seqlens.contiguous(), lams,
            None if bootstrap is None else vector(bootstrap), None if mask is None else mask.contiguous(), gamma,
            one, return_stats,
        )  # fmt: skip
        return out if return_stats else out[:2]

    return gae


def ppo_op(backend: str, launch: Callable[..., None]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """``ppo_loss`` as the custom op ``<backend>_ppo``.

    ``launch(inputs, options, normalizer, count, results)`` fills the results; the loss and its gradients are divided by
    ``normalizer``, or by ``count`` where that is None.
    """
    names, width = (*PpoInputs._fields, "normalizer"), len(PpoInputs._fields)
    tensors = ", ".join(f"Tensor{'?' if i > 2 else ''} {name}" for i, name in enumerate(names))
    floats = ", ".join(f"float {name}" for name in ("count", *PpoOptions._fields[:-1]))

    def fake(*args):
        x = PpoInputs(*args[:width])
        grad_values = x.logp.new_empty(0 if x.values is None else x.logp.shape)
        return PpoResults(
            x.logp.new_empty(()), x.logp.new_empty(len(PPO_METRICS)), torch.empty_like(x.logp), grad_values
        )

    def run(*args):
        normalizer, count, *options = args[width:]
        results = fake(*args)
        launch(PpoInputs(*args[:width]), PpoOptions(*options), normalizer, count, results)
        return tuple(results)

    op = define(
        f"{backend}_ppo", f"({tensors}, {floats}, int kl_estimator) -> (Tensor, Tensor, Tensor, Tensor)",
        run, lambda *args: tuple(fake(*args)),
    )  # fmt: skip

    def setup(ctx, inputs, output):
        x, (normalizer, count, *options) = PpoInputs(*inputs[:width]), inputs[width:]
        ctx.slope = -PpoOptions(*options).entropy_coef * (1.0 / count if count else torch.inf)
        ctx.entropy_shape = None if x.entropy is None else x.entropy.shape
        ctx.has_values, ctx.others = x.values is not None, [None] * len(inputs[width:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[2], output[3], normalizer, x.mask)

    def gradient(ctx, grad_loss, *_):
        refuse_second_derivative("ppo_loss")
        grad_logp, grad_values, normalizer, mask = ctx.saved_tensors
        entropy = None
        if ctx.entropy_shape is not None:
            entropy = grad_loss * ctx.slope if normalizer is None else grad_loss * ctx.slope / normalizer
            entropy = entropy.expand(ctx.entropy_shape) if mask is None else torch.where(mask, entropy, 0.0)
        values = grad_loss * grad_values if ctx.has_values else None
        grads = dict.fromkeys(PpoInputs._fields) | {
            "logp": grad_loss * grad_logp, "entropy": entropy, "values": values
        }  # fmt: skip
        return *grads.values(), *ctx.others

    op.register_autograd(gradient, setup_context=setup)

    def ppo_loss(
        logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2,
        dual_clip: float | None = None, weights: Tensor | None = None, ref_logp: Tensor | None = None,
        kl_coef: float = 0.0, kl_estimator: str = "k3", entropy: Tensor | None = None, entropy_coef: float = 0.0,
        values: Tensor | None = None, old_values: Tensor | None = None, returns: Tensor | None = None,
        value_coef: float = 0.5, value_clip: float | None = 0.2, mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        checks.check_ppo(
            clip_low, clip_high, dual_clip, ref_logp, kl_coef, kl_estimator, entropy, entropy_coef, values, old_values,
            returns, value_clip, normalizer,
        )  # fmt: skip
        old_values = None if value_clip is None or values is None else old_values
        returns = None if values is None else returns
        inputs = PpoInputs(
            logp, old_logp, advantages, weights, ref_logp, entropy, values, old_values, returns, mask
        )  # fmt: skip
        constants = inputs._asdict() | {"logp": None, "entropy": None, "values": None, "normalizer": normalizer}
        refuse_gradients(**constants)
        dtype = compute_dtype(logp.dtype)
        divisor = checks.count_of(logp, mask) if normalizer is None else normalizer
        if torch.compiler.is_compiling() and not isinstance(divisor, Tensor):  # a number would be a graph of its own
            divisor = logp.new_full((), divisor, dtype=dtype)
        tensor, count = (divisor.to(logp.device, dtype), 1.0) if isinstance(divisor, Tensor) else (None, float(divisor))
        loss, metrics, _, _ = op(
            *(None if x is None else x.to(x.dtype if x is mask else dtype).contiguous() for x in inputs), tensor, count,
            clip_low, clip_high, torch.inf if dual_clip is None else dual_clip, kl_coef, entropy_coef, value_coef,
            torch.inf if value_clip is None else value_clip, KL_KINDS[kl_estimator],
        )  # fmt: skip
        return loss, dict(zip(PPO_METRICS, metrics.unbind(), strict=True))

    return ppo_loss


def refuse_second_derivative(op: str) -> None:
    """Raise in a backward pass that is itself recorded: its gradients were made in forward, as constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative here: use backend='reference' with create_graph=True")


def refuse_gradients(**constants: Tensor | float | None) -> None:
    """Raise for a tensor that requires a gradient where a fused loss has none for it."""
    for name, x in constants.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient and the fused loss gives it none: detach it, or use backend='reference'"
            )


def stats_op(backend: str, launch: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """``whitening_stats`` as the custom op ``<backend>_stats``; a gradient flows in torch alone."""
    op = define_plain(
        f"{backend}_stats", "(Tensor x, Tensor? mask) -> Tensor",
        launch, lambda x, _: x.new_empty(3, dtype=compute_dtype(x.dtype)),
    )  # fmt: skip

    def whitening_stats(x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return reference.whitening_stats(x, mask=mask)
        return op(x.detach(), mask)

    return whitening_stats


def whiten_of(stats_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``whiten`` with a backend's own statistics."""

    def whiten(
        x: Tensor,
        *,
        mask: Tensor | None = None,
        shift_mean: bool = True,
        eps: float = 1e-8,
        stats: Tensor | None = None,
    ) -> Tensor:
        stats = stats_of(x, mask=mask) if stats is None else stats
        return reference.whiten(x, mask=mask, shift_mean=shift_mean, eps=eps, stats=stats)

    return whiten
