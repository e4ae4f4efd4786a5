"""Where a step's time and memory went: seconds per phase, tokens per second, share of the device's arithmetic, peaks."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch

WORKING = ("prepare", "update")
"""Phases whose tokens and FLOPs ``PPO`` counts."""


class Clock:
    """Seconds per phase of one step: ``with clock("rollout"): ...``. The phases are named in a profiler's trace, too.

    ``begins`` is told of each as it begins.
    """

    def __init__(self, begins: Callable[[str], None] = lambda _: None) -> None:
        self._begins = begins
        self._began = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._begins(phase)
        began = time.perf_counter()
        with torch.profiler.record_function(f"tppo_fast/{phase}"):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._seconds[phase] += time.perf_counter() - began

    def add(self, phase: str, seconds: float) -> None:
        """Seconds that a phase took beside the step."""
        self._seconds[phase] += seconds

    def metrics(self, sampled: int, counted: Mapping[str, float], peak_rate: float) -> dict[str, float]:
        """What the log says of the step's speed and memory.

        Args:
            sampled: tokens of the step's responses.
            counted: holds ``perf/<phase>_tokens`` and ``perf/<phase>_tflop`` of the ``WORKING`` phases.
            peak_rate: FLOP per second of the device, for MFU.
        """
        total = time.perf_counter() - self._began
        seconds = self._seconds
        found = {f"time/{phase}": spent for phase, spent in seconds.items()}
        found |= {"time/step": total, "perf/tokens_per_second": sampled / total}
        if seconds["rollout"]:
            found["perf/rollout_tokens_per_second"] = sampled / seconds["rollout"]
        for phase in WORKING:
            found[f"perf/{phase}_tokens_per_second"] = counted[f"perf/{phase}_tokens"] / seconds[phase]
            found[f"perf/{phase}_mfu"] = 1e12 * counted[f"perf/{phase}_tflop"] / seconds[phase] / peak_rate
        return {**found, "perf/peak_memory_gib": peak_memory_gib()}


def peak_memory_gib() -> float:
    """Peak memory since the run began: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
