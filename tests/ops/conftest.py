"""One thread, and the backend under test: ``triton`` inside the interpreter's own process, else ``native``."""

from __future__ import annotations

import os

import pytest
import torch
from tppo_kernels import backend as backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
