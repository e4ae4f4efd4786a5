"""Which implementation runs an op: the ``backend`` argument, else ``TPPO_KERNELS_BACKEND``, else the tensors' device.

A backend is one module that defines the op names of ``reference`` (and the row kernels of the linear head).
"""

from __future__ import annotations

import os
from types import ModuleType

from . import reference

BACKENDS = ("reference",)
ENVIRONMENT = "TPPO_KERNELS_BACKEND"


def missing(name: str, device_type: str = "cpu") -> str | None:
    """Why a backend cannot run on such a device here, in one sentence, or None when it can."""
    if name == "reference":
        return None
    return f"unknown backend {name!r} for {device_type}: choose one of {', '.join(BACKENDS)}"


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
    return "reference"


def implementation(backend: str | None, device_type: str) -> ModuleType:
    """The module of the chosen backend."""
    return {"reference": reference}[choose(backend, device_type)]
