"""Imports that may crash or hang, tried in a process of their own (``python -c "from tppo_fast.probing import probe"``).

It reports one JSON line per part; when it dies, the part it was at is broken and the next process goes on after it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

Facts = Mapping[str, Any]

PROBED = ("torch", "cuda", "triton", "native", "transformers", "flash_attn")
MARK = "tppo-doctor:"
TIMEOUT = 60.0
"""Seconds a part may take to import, generous for a cold network disk."""


def gather() -> dict[str, Facts]:
    """part -> facts: ``{"version": ...}``, ``{"absent": True}`` or ``{"error": sentence}``."""
    facts: dict[str, Facts] = {}
    while left := [name for name in PROBED if name not in facts]:
        reported, ended = _run_probe(left)
        facts |= reported
        unreported = [name for name in left if name not in reported]
        if unreported:
            facts[unreported[0]] = {"error": ended}
    return facts


def _run_probe(names: list[str]) -> tuple[dict[str, Facts], str]:
    """The facts that one process reported, and how it ended."""
    code = f"from tppo_fast.probing import probe; probe({names!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, env=environment, check=False)
        output, ended = done.stdout, _ending(done.returncode)
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"importing it did not end within {TIMEOUT:.0f} s"
    lines = [line for line in output.decode(errors="replace").splitlines() if line.startswith(MARK)]
    facts: dict[str, Facts] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # a line cut by a crash
            facts |= json.loads(line.removeprefix(MARK))
    return facts, ended


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"importing it killed Python with {signal.Signals(-code).name}"
    return f"importing it ended Python with exit code {code}"


def probe(names: list[str]) -> None:
    """Print the facts of each part as one marked JSON line. Runs in a process of its own."""
    special = {"torch": _probe_torch, "cuda": _probe_cuda, "native": _probe_native}
    for name in names:
        try:
            facts = special[name]() if name in special else _probe_import(name)
        except Exception as error:  # whatever a broken package raises is the finding
            facts = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(f"\n{MARK}{json.dumps({name: facts})}", flush=True)


def _probe_import(name: str) -> dict[str, Any]:
    if find_spec(name) is None:
        return {"absent": True}
    return {"version": str(importlib.import_module(name).__version__)}


def _probe_torch() -> dict[str, Any]:
    facts = _probe_import("torch")
    if "version" in facts:
        import torch

        torch.mm(torch.ones(2, 2), torch.ones(2, 2))  # a build for another CPU dies here
        facts |= {"cuda_build": torch.version.cuda or torch.version.hip, "threads": torch.get_num_threads()}
    return facts


def _probe_cuda() -> dict[str, Any]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return {"absent": True, "why": " ".join(" ".join(str(w.message) for w in caught).split())[:300]}
    torch.ones(1, device="cuda").add(1).item()  # a GPU that this build has no code for fails here, not in step 1
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}")
    flash = torch.backends.cuda.is_flash_attention_available()
    return {"version": torch.version.cuda or torch.version.hip, "devices": devices, "flash": flash}


def _probe_native() -> dict[str, Any]:
    from tppo_kernels import backend

    reason = backend.missing("native")
    return {"version": "built"} if reason is None else {"absent": True, "why": reason}
