"""Weights between two processes of one machine: a safetensors file in shared memory, gone when it was read."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tppo_fast.errors import EngineError

SHARED = Path("/dev/shm")


@contextlib.contextmanager
def bucket_file(bucket: Sequence[tuple[str, Tensor]]) -> Iterator[Path]:
    """A file with these weights, which this user alone can read, inside ``with`` alone.

    What a process that was killed inside left behind goes at the next call, on the same machine (or in the same container).

    Raises:
        EngineError: there is no room for it.
    """
    machine = f"tppo-{Path('/proc/self/ns/pid').stat().st_ino}"
    for folder in SHARED.glob(f"{machine}-*"):
        if not Path("/proc", folder.name.split("-")[2]).exists():
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=SHARED, prefix=f"{machine}-{os.getpid()}-") as folder:
        file = Path(folder) / "weights.safetensors"
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in bucket}, file)
        except Exception as error:  # safetensors has no type of its own for a full disk
            raise EngineError(
                f"{SHARED} cannot hold a bucket of weights ({error}): lower vllm.bucket_mib, or give a container more shared "
                "memory (docker run --shm-size)"
            ) from None
        yield file
