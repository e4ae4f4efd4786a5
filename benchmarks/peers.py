"""Independent implementations of the ops: how each is called, or in one sentence why it cannot run here.

Calls were checked against torch 2.13, liger-kernel 0.8.5, trl 1.12.0, verl 0.9.1, openrlhf 0.11.2, cut-cross-entropy 25.1.1 and
quack-kernels 0.6.5. ``Found`` is what makes a row: a function, or the sentence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.drivers import ruler

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden, weight) -> (logp, entropy); or (logits, targets) -> them."""
Scalar = Callable[[Tensor, Tensor], Tensor]
"""(hidden, weight) -> one number a row, or a loss."""
NO_ENTROPY = "it has no gradient of the entropy"
GPU_ONLY = "its kernel needs a GPU"
_OPENRLHF = {"alone": 9, "stand_ins": ("deepspeed", "pylatexenc", "openrlhf.trainer.ray.launcher")}
_VERL: dict[str, Any] = {}
if importlib.util.find_spec("ray") is None:  # an offline GPU machine has verl's wheel without what it depends on
    _VERL = {
        "alone": 1,
        "stand_ins": ("omegaconf", "tensordict", "tensordict.tensorclass", "codetiming", "orjson", "ray"),
    }


def install(folder: Path | None) -> list[str]:
    """Install the folder's wheels where only this process sees them; returns that place, for others' import paths."""
    wheels = sorted(folder.glob("*.whl")) if folder else []
    if not wheels:
        return []
    target = tempfile.mkdtemp(prefix="peers")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--no-index",
        "--no-deps",
        "--target",
        target,
    ]
    subprocess.run([*command, *map(str, wheels)], check=True)
    sys.path.append(target)  # after what is installed: torch and triton stay this machine's
    return [target]


@functools.cache
def find(module: str, name: str, *, alone: int = 0, stand_ins: Sequence[str] = ()) -> Any:
    """The peer's function, or one sentence (a ``str``) that says why there is none.

    Args:
        alone: import the module without running the ``__init__`` of so many of its packages, which need what it does not.
        stand_ins: modules that it imports and that nothing called here needs: an empty one of that name stands there meanwhile.
    """
    try:
        with warnings.catch_warnings(), _standing_in(stand_ins):
            warnings.simplefilter("ignore")
            if module.startswith("trl."):
                ruler.hide_vllm_from_trl()
            return getattr(_import_alone(module, alone), name)
    except Exception as error:
        return f"{module}.{name} cannot be imported ({type(error).__name__}: {str(error)[:120]})"


def _import_alone(module: str, number: int) -> Any:
    if not number:
        return importlib.import_module(module)
    parents = module.split(".")[:-1][:number]
    found = importlib.util.find_spec(parents[0])
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {parents[0]!r}")
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        if name not in sys.modules:
            package, spec = types.ModuleType(name), importlib.machinery.ModuleSpec(name, None, is_package=True)
            package.__path__ = [str(Path(p, *parents[1:depth])) for p in found.submodule_search_locations]
            spec.submodule_search_locations, package.__spec__ = package.__path__, spec
            sys.modules[name] = package
    return importlib.import_module(module)


class _StandIn(types.ModuleType):
    """Whatever is asked of it is ``object``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@contextlib.contextmanager
def _standing_in(names: Sequence[str]) -> Iterator[None]:
    added = [name for name in names if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in added})
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def row_logprobs() -> dict[str, Pair | str]:
    """(logits, targets) -> (logp, entropy)."""
    found: dict[str, Pair | str] = {}
    for name, module, logp, entropy, options in (
        ("TRL", "trl.trainer.utils", "selective_log_softmax", "entropy_from_logits", {}),
        ("verl", "verl.utils.torch_functional", "logprobs_from_logits", "entropy_from_logits", _VERL),
        ("OpenRLHF", "openrlhf.models.utils", "log_probs_from_logits", "compute_entropy", _OPENRLHF),
    ):
        parts = find(module, logp, **options), find(module, entropy, **options)
        problem = next((part for part in parts if isinstance(part, str)), None)
        found[name] = problem or _both(*parts)
    return found


def _both(logp: Any, entropy: Any) -> Pair:
    """As one sequence, [1, A, V]: some loop over the first axis, which is the batch's in their trainers."""

    def pair(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.float()[None]
        return logp(wide, targets[None])[0], entropy(wide)[0]

    return pair


def heads(targets: Tensor) -> dict[str, Pair | str]:
    """Heads whose entropy has a gradient. Their backwards want dense upstream gradients, which ``* 1.0`` makes."""
    liger = find("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")

    def liger_pair(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = liger.apply(h, w, targets, 1.0, -100, 1, True)
        return nll * -1.0, entropy * 1.0

    where = "verl.utils.kernel.linear_cross_entropy"
    verl: Any = find(where, "linear_cross_entropy", **_VERL) if targets.is_cuda else GPU_ONLY

    def verl_pair(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = verl(h, w, targets, 1.0, "none")
        return logp * 1.0, entropy * 1.0

    return {"Liger": _or_why(liger, liger_pair), "verl": _or_why(verl, verl_pair)}


def logp_heads(targets: Tensor) -> dict[str, Scalar | str]:
    """Heads with a log-probability per row, and an entropy without gradient or none."""
    trl = find("trl.trainer.utils", "_ChunkedLogProbFunction")
    quack: Any = find("quack.linear_cross_entropy", "linear_cross_entropy_func") if targets.is_cuda else GPU_ONLY
    return {
        "TRL": _or_why(trl, lambda h, w: trl.apply(h, w, targets, 1.0, 8192, None, 1.0)[0]),
        **{name: _negative(cce) for name, cce in _cce(targets, "none").items()},
        **{name: _negative(nll) for name, nll in _torch(targets, "none").items()},
        "QuACK: all logits": _negative(
            _or_why(quack, lambda h, w: quack(h, w, None, targets, reduction="none", inplace_backward=True))
        ),
    }


def cross_entropies(targets: Tensor) -> dict[str, Scalar | str]:
    """Mean cross-entropies of a head: QuACK's chunked one has no per-row result."""
    quack: Any = find("quack.linear_cross_entropy", "chunked_linear_cross_entropy") if targets.is_cuda else GPU_ONLY
    where = "liger_kernel.transformers.functional"
    liger: Any = find(where, "liger_fused_linear_cross_entropy") if targets.is_cuda else GPU_ONLY
    return {
        **_cce(targets, "mean"),
        **_torch(targets, "mean"),
        "QuACK": _or_why(quack, lambda h, w: quack(h, w, targets, reduction="mean")),
        "Liger": _or_why(liger, lambda h, w: liger(h, w, targets)),
    }


def _or_why(found: Any, call: Any) -> Any:
    return found if isinstance(found, str) else call


def _negative(nll: Scalar | str) -> Scalar | str:
    return nll if isinstance(nll, str) else lambda h, w: -nll(h, w)


def _cce(targets: Tensor, reduction: str) -> dict[str, Scalar | str]:
    """Apple's. On a CPU torch.compile takes its kernel's place, which filters nothing; on a GPU also with the filter off."""
    cce = find("cut_cross_entropy", "linear_cross_entropy")
    filters = {"CCE": "auto", "CCE: filter off": None} if targets.is_cuda else {"CCE: its torch.compile path": None}
    impl = "cce" if targets.is_cuda else "torch_compile"
    return {
        name: _or_why(cce, lambda h, w, eps=eps: cce(h, w, targets, reduction=reduction, filter_eps=eps, impl=impl))
        for name, eps in filters.items()
    }


def _torch(targets: Tensor, reduction: str) -> dict[str, Scalar | str]:
    """torch's own: as it is called by default, all logits at once, and chunked; left to choose, it takes 3 rows a chunk here."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return {"F.linear_cross_entropy": f"torch {torch.__version__} has none"}
    chunks = {
        "F.linear_cross_entropy": None,
        "F.linear_cross_entropy: chunks of 128": options(batch_chunk_size=128, chunking_method=None),
    }
    return {
        name: lambda h, w, chosen=chosen: F.linear_cross_entropy(h, w, targets, reduction=reduction, options=chosen)
        for name, chosen in chunks.items()
    }


def liger_policy_loss(targets: Tensor, old_logp: Tensor, advantages: Tensor, chunk_size: int) -> Scalar | str:
    """Liger's fused GRPO loss of a head, clipped at 0.2 without KL. It takes an advantage per SEQUENCE: each action is
    made a sequence of its own, [A, 1], which is exact."""
    loss = find("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if isinstance(loss, str):
        return loss
    fused = loss(
        beta=0.0, compiled=targets.is_cuda, use_ref_model=False, chunk_size=chunk_size, epsilon_low=0.2, epsilon_high=0.2,
        loss_type="grpo",
    )  # fmt: skip

    def run(h: Tensor, w: Tensor) -> Tensor:
        mask = torch.ones(len(targets), 1, device=h.device)
        return fused(h[:, None], w, targets[:, None], mask, advantages, old_per_token_logps=old_logp[:, None])[0]

    return run


Gae = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""(rewards [B, T], values [B, T], gamma, lambda) -> (advantages, returns), [B, T]."""


def gaes() -> dict[str, Gae | str]:
    """Loops over padded [B, T]. verl's whitens the advantages too: the plain ones are its returns less the values."""
    verl = find("verl.trainer.ppo.core_algos", "compute_gae_advantage_return", **_VERL)
    maker = find("openrlhf.trainer.ppo_utils.experience_maker", "RemoteExperienceMaker", **_OPENRLHF)

    def verl_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        returns = verl(rewards, values, torch.ones_like(rewards), gamma, lam)[1]  # pyright: ignore[reportArgumentType]
        return returns - values, returns

    def openrlhf_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        return maker.get_advantages_and_returns(None, values, rewards, torch.ones_like(rewards), gamma, lam)

    return {"verl": _or_why(verl, verl_gae), "OpenRLHF": _or_why(maker, openrlhf_gae)}


PPOLoss = Callable[[dict[str, Tensor]], Tensor]
"""The [A] tensors of ``testing.random_ppo`` -> the loss: clip 0.2, dual clip 3, 0.5 value + 0.1 KL (k3) - 0.01 entropy."""


def ppo_losses() -> dict[str, PPOLoss | str]:
    """Their own policy, value and KL functions on one row of tokens, summed."""
    algos = "verl.trainer.ppo.core_algos"
    policy, value, kl = (find(algos, n, **_VERL) for n in ("compute_policy_loss", "compute_value_loss", "kl_penalty"))

    def verl(x: dict[str, Tensor]) -> Tensor:
        x = {name: tensor[None] for name, tensor in x.items()}
        mask = torch.ones_like(x["logp"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # verl deprecates it in favour of one that needs its configuration
            loss = policy(x["old_logp"], x["logp"], x["advantages"], mask, cliprange=0.2, clip_ratio_c=3.0)[0]
        loss = loss + 0.5 * value(x["values"], x["returns"], x["old_values"], mask, cliprange_value=0.2)[0]
        return loss + 0.1 * kl(x["logp"], x["ref_logp"], "low_var_kl").mean() - 0.01 * x["entropy"].mean()

    theirs = "openrlhf.models.loss"
    losses = [find(theirs, n, **_OPENRLHF) for n in ("PolicyLoss", "ValueLoss")]
    their_kl = find("openrlhf.models.utils", "compute_approx_kl", **_OPENRLHF)

    def openrlhf(x: dict[str, Tensor]) -> Tensor:
        x = {name: tensor[None] for name, tensor in x.items()}
        mask = torch.ones_like(x["logp"])
        loss = losses[0](dual_clip=3.0)(x["logp"], x["old_logp"], x["advantages"], mask)[0]
        loss = loss + 0.5 * losses[1](clip_eps=0.2)(x["values"], x["old_values"], x["returns"], mask)
        return loss + 0.1 * their_kl(x["logp"], x["ref_logp"], kl_estimator="k3").mean() - 0.01 * x["entropy"].mean()

    problems = [
        next((p for p in parts if isinstance(p, str)), None) for parts in ((policy, value, kl), (*losses, their_kl))
    ]
    return {"verl": problems[0] or verl, "OpenRLHF": problems[1] or openrlhf}
