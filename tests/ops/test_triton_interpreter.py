"""The Triton kernels through Triton's interpreter: in its own process, as it is chosen when triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
@pytest.mark.timeout(1800)  # a whole suite, several minutes where others are busy
def test_interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [
        str(HERE / f"test_{name}.py")
        for name in ("matrix", "ppo_loss", "any", "head", "head_loss", "live_rows", "arguments")
    ]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider", "--no-header"]
    run = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout, run.stdout[-3000:]
