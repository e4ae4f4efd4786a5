"""Which implementation runs an op: the ``backend`` argument, else ``TPPO_KERNELS_BACKEND``, else the tensors' device."""

from __future__ import annotations

import os
from functools import lru_cache

BACKENDS = ("reference",)
ENVIRONMENT = "TPPO_KERNELS_BACKEND"


@lru_cache
def missing(name: str) -> str | None:
    """Why a backend cannot run here, in one sentence, or None when it can."""
    if name == "reference":
        return None
    return f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}"


def choose(backend: str | None, device_type: str) -> str:
    """The backend to use for tensors on ``device_type``.

    Raises:
        ValueError: a backend was asked for by name (argument or environment) and cannot run here.
    """
    asked = backend or os.environ.get(ENVIRONMENT)
    if asked:
        if reason := missing(asked):
            raise ValueError(reason)
        return asked
    return "reference"
