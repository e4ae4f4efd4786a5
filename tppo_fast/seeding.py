"""One rule for randomness: a seed for each purpose, derived from the run's seed and counters, so that resuming needs no luck."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tppo_fast.errors import UserError

_inside = threading.RLock()  # the thread of a run enters again to evaluate


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(config.seed, "rollout", step)``; the same on every machine."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def batch(seed: int, purpose: str, step: int, *, size: int, count: int) -> list[int]:
    """Which of ``count`` examples make up a step: shuffled passes over all of them, a function of (seed, step) alone."""
    places = (divmod(position, count) for position in range(step * size, (step + 1) * size))
    return [int(_permutation(seed, purpose, epoch, count)[place]) for epoch, place in places]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, purpose: str, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator(seed, purpose, epoch))


def seed_everything(seed: int) -> None:
    """Seed the global generators, for the code of others: initialisation, user-written rewards."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Leave torch's settings and the global generators as they were: a caller in Python has uses of its own for them.

    Inside, gradients are recorded and what is made is fp32, whatever the caller had chosen. Only one thread is inside at a time.

    Raises:
        UserError: another thread is.
    """
    with _alone():
        state, threads, dtype = global_state(), torch.get_num_threads(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            set_global_state(state)
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    if not _inside.acquire(blocking=False):
        raise UserError(
            "another thread of this process is in a run, which needs torch's settings and the random generators to itself: wait "
            "for it, or start this one in a process of its own"
        )
    try:
        yield
    finally:
        _inside.release()


def global_state() -> dict[str, Any]:
    """The global generators' states as JSON values; of the GPUs, the one in use."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(internal), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [torch.cuda.get_rng_state().tolist()]
    return state


def set_global_state(state: dict[str, Any]) -> None:
    """Restore what ``global_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = dict(state["numpy"])
    numpy_state["state"] = {**numpy_state["state"], "key": np.array(numpy_state["state"]["key"], dtype=np.uint32)}
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"][0], dtype=torch.uint8))
