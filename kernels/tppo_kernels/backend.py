"""Which implementation runs an op: the ``backend`` argument, else ``TPPO_KERNELS_BACKEND``, else the tensors' device.

A backend is one module that defines the op names of ``reference``. CPU tensors take ``native`` where it was built.
"""

from __future__ import annotations

import os
from types import ModuleType

from . import native, reference

BACKENDS = ("reference", "native")
ENVIRONMENT = "TPPO_KERNELS_BACKEND"


def missing(name: str, device_type: str = "cpu") -> str | None:
    """Why a backend cannot run on such a device here, in one sentence, or None when it can."""
    if name == "reference":
        return None
    if name == "native":
        return native.missing(device_type)
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
    return "native" if native.missing(device_type) is None else "reference"


def implementation(backend: str | None, device_type: str) -> ModuleType:
    """The module of the chosen backend."""
    return {"reference": reference, "native": native}[choose(backend, device_type)]
