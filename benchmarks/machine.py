"""What a figure depends on: the machine, its libraries and the commit."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import torch
from tppo_kernels import native

from tppo_fast.report import machine_record

COMMIT = "BENCH_COMMIT"
"""Names the commit that is measured, where git here cannot: a copy of a working tree, say."""


def record() -> dict[str, str]:
    """Versions and commit as every report has them, and what the CPU is."""
    return {**machine_record(), "commit": commit(), **cpu(), "date": datetime.now(UTC).date().isoformat()}


def commit() -> str:
    """Of this checkout, with ``-dirty`` after local changes; or what the environment says."""
    return os.environ.get(COMMIT) or machine_record()["commit"]


def cpu() -> dict[str, str]:
    """Its name, the instructions that our native ops use on it, and its memory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "simd": native.missing() or native.simd(),
        "memory": f"{memory:.0f} GiB",
    }


def folder() -> str:
    """The folder of this device's results: "cpu", or such as "h100-80gb-hbm3"."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia")).strip("-")
