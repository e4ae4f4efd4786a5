"""Independent implementations, where they are installed or lie as wheels in a folder: how each is called.

Calls were checked against liger-kernel 0.8.5, trl 1.12.0, verl 0.9.1, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5. A
peer that cannot be imported is left out by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden, weight) -> (logp, entropy)."""
Scalar = Callable[[Tensor, Tensor], Tensor]
"""(hidden, weight) -> a loss."""


def install(folder: Path | None) -> None:
    """Install the folder's wheels where only this process sees them."""
    wheels = sorted(folder.glob("*.whl")) if folder else []
    if wheels:
        target = tempfile.mkdtemp(prefix="peers")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target]
        subprocess.run([*command, *map(str, wheels)], check=True)
        sys.path.append(target)  # after what is installed: torch and triton stay this machine's


def peer(module: str, name: str, *, alone: bool = False) -> Any:
    """The peer's function, or None with a line that says it is left out. ``alone``: see ``_import_alone``."""
    try:
        return getattr((_import_alone if alone else importlib.import_module)(module), name)
    except Exception as error:
        print(f"left out: {module}.{name} ({type(error).__name__}: {str(error)[:100]})", flush=True)
        return None


def _import_alone(module: str) -> Any:
    """A module without running its packages' ``__init__``: verl's needs ray, its head needs torch and triton."""
    parents = module.split(".")[:-1]
    found = importlib.util.find_spec(parents[0])
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {parents[0]!r}")
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(Path(p, *parents[1:depth])) for p in found.submodule_search_locations]
            sys.modules[name] = package
    return importlib.import_module(module)


def heads(targets: Tensor) -> dict[str, Pair]:
    """Heads whose entropy has a gradient. Their backwards want dense upstream gradients, which ``* 1.0`` makes."""
    found: dict[str, Pair] = {}
    if liger := peer("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction"):

        def liger_pair(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            nll, entropy = liger.apply(h, w, targets, 1.0, -100, 1, True)
            return nll * -1.0, entropy * 1.0

        found["Liger"] = liger_pair
    verl = (
        peer("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", alone=True) if targets.is_cuda else None
    )
    if verl:

        def verl_pair(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            logp, entropy = verl(h, w, targets, 1.0, "none")
            return logp * 1.0, entropy * 1.0

        found["verl"] = verl_pair
    return found


def logp_heads(targets: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Heads with a log-probability per row, and an entropy without gradient or none."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if trl := peer("trl.trainer.utils", "_ChunkedLogProbFunction"):
        found["TRL"] = lambda h, w: trl.apply(h, w, targets, 1.0, 8192, None, 1.0)[0]
    for name, filter_eps in (("CCE", "auto"), ("CCE, filter off", None)):
        if cce := _cce(targets, "none", filter_eps):
            found[name] = lambda h, w, cce=cce: -cce(h, w)
    if quack := peer("quack.linear_cross_entropy", "linear_cross_entropy_func") if targets.is_cuda else None:
        found["QuACK, all logits"] = lambda h, w: -quack(h, w, None, targets, reduction="none", inplace_backward=True)
    return found


def cross_entropies(targets: Tensor) -> dict[str, Scalar]:
    """Mean cross-entropies of a head: QuACK's chunked one has no per-row result."""
    found: dict[str, Scalar] = {}
    for name, filter_eps in (("CCE", "auto"), ("CCE, filter off", None)):
        if cce := _cce(targets, "mean", filter_eps):
            found[name] = cce
    if quack := peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy") if targets.is_cuda else None:
        found["QuACK"] = lambda h, w: quack(h, w, targets, reduction="mean")
    if liger := peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"):
        found["Liger"] = lambda h, w: liger(h, w, targets)
    return found


def _cce(targets: Tensor, reduction: str, filter_eps: str | None) -> Scalar | None:
    """Apple's; on a CPU it has torch.compile instead of its kernel, which filters nothing."""
    if not targets.is_cuda and filter_eps:
        return None
    cce = peer("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if targets.is_cuda else "torch_compile"
    return cce and (lambda h, w: cce(h, w, targets, reduction=reduction, filter_eps=filter_eps, impl=impl))


def liger_policy_loss(targets: Tensor, old_logp: Tensor, advantages: Tensor, chunk_size: int) -> Scalar | None:
    """Liger's fused GRPO loss of a head, clipped at 0.2 without KL. It takes an advantage per SEQUENCE: each action is
    made a sequence of its own, [A, 1], which is exact."""
    loss = peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if loss is None:
        return None
    fused = loss(
        beta=0.0, compiled=targets.is_cuda, use_ref_model=False, chunk_size=chunk_size, epsilon_low=0.2, epsilon_high=0.2,
        loss_type="grpo",
    )  # fmt: skip

    def run(h: Tensor, w: Tensor) -> Tensor:
        mask = torch.ones(len(targets), 1, device=h.device)
        return fused(h[:, None], w, targets[:, None], mask, advantages, old_per_token_logps=old_logp[:, None])[0]

    return run


def verl_gae(lengths: list[int], rewards: Tensor, values: Tensor) -> Callable[[], list[Tensor]] | None:
    """verl's loop over padded [B, T]. It whitens the advantages itself: the plain ones are its returns less the values."""
    gae = peer("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")
    if gae is None:
        return None
    square = rewards.view(len(lengths), -1), values.view(len(lengths), -1)
    mask = torch.ones_like(square[0])

    def run() -> list[Tensor]:
        returns = gae(*square, mask, 0.99, 0.95)[1].flatten()
        return [returns - values, returns]

    return run
