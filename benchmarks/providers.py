"""Who is compared: every provider, the suites it takes part in, and why it cannot run here, if it cannot.

A new one is an entry in ``PROVIDERS``, and its calls in the suite's module (an op: ``peers``; a step: its driver). It runs

- in the benchmark's own process (``environment=None``), or
- in a process of an environment of its own, where its pinned dependencies cannot clash with ours (``environment``, one of
  ``benchmarks.peer_envs``, and ``driver``, a script of this folder). The two talk through files in a folder, see ``ask``.

This module imports no torch, so that listing providers is instant.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks import peer_envs
from tppo_fast.atomic import write_atomic
from tppo_fast.errors import UserError

Suite = Literal["ops", "rollout", "step", "learning"]
SUITES: tuple[Suite, ...] = get_args(Suite)


def present() -> str | None:
    """Nothing is missing."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One row of the tables, or several: variants of it are called ``name: variant``."""

    name: str
    """As tables and plots call it."""
    suites: tuple[Suite, ...]
    """Where it takes part."""
    missing: Callable[[], str | None] = present
    """Why it cannot run on this machine, in one sentence, or None. Cheap: it imports nothing heavy."""
    package: str | None = None
    """The distribution whose version stands in the record."""
    environment: str | None = None
    """Its own environment, by the name ``benchmarks.peer_envs`` gives it; None: the benchmark's own process."""
    driver: str | None = None
    """The script in this folder that ``ask`` runs there, such as ``"drivers/trl_ppo.py"``."""


def needs(module: str) -> Callable[[], str | None]:
    """``Provider.missing`` of one that needs a module here."""

    def missing() -> str | None:
        return None if importlib.util.find_spec(module) else f"{module} is not installed here"

    return missing


def needs_gpu(module: str) -> Callable[[], str | None]:
    """``Provider.missing`` of one whose kernels run on an NVIDIA GPU only."""

    def missing() -> str | None:
        if not Path("/dev/nvidiactl").exists():
            return "its kernels need an NVIDIA GPU, and this machine has none"
        return needs(module)()

    return missing


def needs_environment(name: str) -> Callable[[], str | None]:
    """``Provider.missing`` of one that runs in an environment of its own."""
    return lambda: peer_envs.missing(name)


def never(reason: str) -> Callable[[], str | None]:
    """``Provider.missing`` of one that is not driven at all."""
    return lambda: reason


PROVIDERS: tuple[Provider, ...] = (
    Provider(name="tppo_fast", suites=("ops", "rollout", "step", "learning")),
    Provider(name="torch eager", suites=("ops",), package="torch"),
    Provider(name="torch.compile", suites=("ops",), package="torch"),
    Provider(name="F.linear_cross_entropy", suites=("ops",), package="torch"),
    Provider(name="padded PyTorch", suites=("ops", "step"), package="torch"),
    Provider(name="TRL", suites=("ops", "rollout"), missing=needs("trl"), package="trl"),
    Provider(
        name="TRL PPO", suites=("step",), missing=needs_environment("trl-ppo"), environment="trl-ppo",
        driver="drivers/trl_ppo.py",
    ),
    Provider(
        name="TRL GRPO", suites=("step",), missing=needs_environment("trl-grpo"), environment="trl-grpo",
        driver="drivers/trl_grpo.py",
    ),
    Provider(
        name="verl trainer", suites=("step",),
        missing=never(
            "its Ray workers need CUDA, ROCm or Ascend devices and a server of vLLM, SGLang or TensorRT-LLM to sample from; "
            "its functions are in the ops suite"
        ),
    ),
    Provider(
        name="OpenRLHF trainer", suites=("step",),
        missing=never("its Ray workers need CUDA, for flash-attn and vLLM; its functions are in the ops suite"),
    ),
    Provider(name="verl", suites=("ops",), missing=needs("verl"), package="verl"),
    Provider(name="OpenRLHF", suites=("ops",), missing=needs("openrlhf"), package="openrlhf"),
    Provider(name="Liger", suites=("ops",), missing=needs("liger_kernel"), package="liger-kernel"),
    Provider(name="CCE", suites=("ops",), missing=needs("cut_cross_entropy"), package="cut-cross-entropy"),
    Provider(name="QuACK", suites=("ops",), missing=needs_gpu("quack"), package="quack-kernels"),
)  # fmt: skip


def chosen(suite: Suite, names: Sequence[str] | None) -> list[Provider]:
    """The suite's providers; ``names`` keeps some of them (None: all).

    Raises:
        UserError: a name that no provider has.
    """
    known = {provider.name for provider in PROVIDERS}
    if unknown := sorted(set(names or ()) - known):
        raise UserError(f"--providers {unknown[0]!r}: no provider is called that; there are {', '.join(sorted(known))}")
    return [p for p in PROVIDERS if suite in p.suites and (names is None or p.name in names)]


def record(providers: Sequence[Provider]) -> dict[str, dict[str, str | None]]:
    """Name -> its version and why it cannot run here, for the results."""
    return {p.name: {"version": _version(p), "missing": p.missing()} for p in providers}


def named(name: str) -> Provider:
    """The provider of a row, ``name`` or ``name: variant``."""
    return next(p for p in PROVIDERS if p.name == name.split(":")[0])


def _version(provider: Provider) -> str | None:
    if provider.environment:
        return peer_envs.peer(provider.environment).partition("==")[2]
    package = provider.package
    try:
        return metadata.version(package) if package else None
    except metadata.PackageNotFoundError:
        return None


def ask(
    python: Path, driver: str, folder: Path, request: Mapping[str, Any], tensors: Mapping[str, Any] | None = None, *,
    threads: int = 1, timeout: float = 1800, extra_path: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run ``python driver folder`` and return its answer.

    The driver reads ``request.json`` and, if there is one, ``inputs.safetensors`` in ``folder``, and leaves ``answer.json`` and,
    for the correctness gate, ``outputs.safetensors`` there. It imports nothing of tppo_fast, but modules beside it, and what lies
    in the folders of ``extra_path``.

    Raises:
        RuntimeError: it failed, took longer than ``timeout`` seconds or left no answer; the message ends with its last lines.
    """
    script = Path(__file__).parent / driver
    path = os.pathsep.join(
        [str(script.parent), *extra_path]
    )  # instead of ours: nothing of this checkout may be in its way
    settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    return answer_in(folder, [python, script, folder], request, tensors, settings, timeout=timeout)


def answer_in(
    folder: Path, command: Sequence[str | Path], request: Mapping[str, Any], tensors: Mapping[str, Any] | None,
    settings: Mapping[str, str], *, timeout: float, cwd: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What ``command`` leaves as ``answer.json`` in ``folder``, where the request lies; ``settings`` are of its environment.

    Raises:
        RuntimeError: as ``ask``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    write_atomic(folder / "request.json", json.dumps(dict(request)).encode())
    if tensors:
        from safetensors.torch import save

        write_atomic(folder / "inputs.safetensors", save(dict(tensors)))
    environment = os.environ | settings
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it was stopped after {timeout:.0f} s") from None
    if done.returncode or not answer.exists():
        raise RuntimeError(f"it ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(answer.read_text())
