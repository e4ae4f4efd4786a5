"""One thread, and the backend under test: ``triton`` inside the interpreter's own process, else ``native``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tppo_kernels import backend as backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    spec = importlib.util.spec_from_file_location("interpreter_patch", Path(__file__).parent / "interpreter_patch.py")
    assert spec is not None
    assert spec.loader is not None
    interpreter_patch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpreter_patch)
    interpreter_patch.patch()
    np.seterr(all="ignore")  # exp2 of a padded column may overflow: it is never stored
    from tppo_kernels.triton_ops.common import BLOCKS
    from tppo_kernels.triton_ops.live_rows import TILES, Tiles

    # The interpreter scans one entry at a time. Chains of tiles are short, and small shapes have several.
    BLOCKS.update(gae=(16, 4), live_rows=(16, 4), row_forward=(1024, 4), row_backward=(1024, 4))
    importlib.import_module("tppo_kernels.triton_ops.gae").CARRIED_TILES = 4
    TILES.update(dict.fromkeys(TILES, Tiles(32, 64, 32, 4, 2)))
settings.register_profile("ops", deadline=None, derandomize=True, max_examples=6 if INTERPRETED else 100)
settings.load_profile("ops")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["triton" if INTERPRETED else "native"])
def backend(request):
    if reason := backends.missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def exact(backend):
    """The widest dtype the backend computes in."""
    return torch.float32 if backend == "triton" else torch.float64
