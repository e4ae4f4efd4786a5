"""Every kernel in its shipped configurations compiles for GPUs that are not here: no spills, shared memory within
limits.

Also tensor-core instructions where a kernel has a dot of 16-bit operands. One process per target; the table is kept by
``python tests/ops/aot.py sm_90 benchmarks/results/aot/sm_90.json``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = {
    "row_forward", "row_backward", "live_rows_kernel", "d_hidden_kernel", "d_weight_kernel", "gae_tiles", "gae_apply",
    "stats_kernel", "ppo_kernel",
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile"),
]


TARGETS = ["sm_90", "gfx942"]
if os.environ.get("AOT_TARGETS") == "all":  # two minutes of a core each, and what fits sm_90 has fitted these
    TARGETS += ["sm_80", "sm_100"]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "aot.py"), target, str(tmp_path / "table.json")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads((tmp_path / "table.json").read_text())["kernels"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["dot"] for row in rows} == {None, "bf16", "f16", "f32"}
    for row in rows:
        assert row["spills"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        if row["dot"] != "f32":  # fp32 operands keep their precision: no TF32
            assert bool(row["tensor_core"]) == (row["dot"] is not None), row
        assert row["instructions"] > 0, row
