"""Which implementation runs an op: the ``backend`` argument, else ``TPPO_KERNELS_BACKEND``, else the tensors' device.

A backend is one module that defines the op names of ``reference``. CPU tensors take ``native`` where it was built, GPU
tensors take ``triton``; without them the reference runs. Nothing here asks a device anything.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

from . import native, reference

BACKENDS = ("reference", "native", "triton")
ENVIRONMENT = "TPPO_KERNELS_BACKEND"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _missing_triton(device_type: str) -> str | None:
    if not HAS_TRITON:
        return "backend 'triton' needs the package triton: pip install triton"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "backend 'triton' runs on a GPU and the tensors are on the CPU: move them, or set TRITON_INTERPRET=1"
    return None


def missing(name: str, device_type: str = "cpu") -> str | None:
    """Why a backend cannot run on such a device here, in one sentence, or None when it can."""
    if name == "reference":
        return None
    if name == "native":
        return native.missing(device_type)
    if name == "triton":
        return _missing_triton(device_type)
    return f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}"


def choose(backend: str | None, device_type: str) -> str:
    """The backend to use for tensors on ``device_type``.

    Raises:
        ValueError: a backend was asked for by name (argument or environment) and cannot run here.
    """
    asked = backend or os.environ.get(ENVIRONMENT)
    if asked:
        if reason := missing(asked, device_type):
            raise ValueError(reason)
        return asked
    preferred = "native" if device_type == "cpu" else "triton"
    return "reference" if missing(preferred, device_type) else preferred


def implementation(backend: str | None, device_type: str) -> ModuleType:
    """The module of the chosen backend; triton is imported when it is first used."""
    name = choose(backend, device_type)
    if name == "triton":
        from . import triton_ops

        return triton_ops
    return native if name == "native" else reference
