"""Torch's own instruments around a run: a profiler's trace of some steps, and a snapshot of the GPU's allocator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tppo_fast.errors import UserError

TRACE = "trace.json.gz"
SNAPSHOT = "memory_snapshot.pickle"
ENTRIES = 100_000
"""Most allocations kept in a snapshot, the newest."""


class StepTrace:
    """``with StepTrace(folder, steps) as trace: ... trace.step()`` after every step; does nothing with 0 steps.

    One step warms up, then ``steps`` are recorded: operators, shapes, memory, GPU kernels, and the loop's phases by name. The
    trace (for Perfetto or chrome://tracing) is written once they are over, or when the run ends before that.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.path = folder / TRACE
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile: Any = steps and profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )

    def _write(self, trace: Any) -> None:
        temporary = self.path.with_name(f"tmp-{TRACE}")  # the ending tells torch to compress
        trace.export_chrome_trace(str(temporary))
        temporary.replace(self.path)

    def step(self) -> None:
        """A step is over."""
        if self._profile:
            self._profile.step()

    def __enter__(self) -> StepTrace:
        if self._profile:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile:
            self._profile.__exit__(*error)


@contextlib.contextmanager
def memory_snapshot(folder: Path, device: torch.device, wanted: bool) -> Iterator[None]:
    """Where it is wanted, record every allocation on the GPU inside and write torch's snapshot, also of a run that fails.

    The file is for https://pytorch.org/memory_viz; it is a pickle, as torch makes it, and nothing here reads it.

    Raises:
        UserError: the run is on a CPU, whose allocator keeps no history.
    """
    if not wanted:
        yield
        return
    if device.type != "cuda":
        raise UserError(
            f"--memory-snapshot: torch records the allocations of a GPU, and this run is on device {device.type!r}; "
            "use --profile, whose trace holds the CPU's memory, or tppo-fast plan"
        )
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=ENTRIES)
    try:
        yield
    finally:
        temporary = folder / f"{SNAPSHOT}.tmp"
        torch.cuda.memory._dump_snapshot(str(temporary))
        torch.cuda.memory._record_memory_history(enabled=None)
        temporary.replace(folder / SNAPSHOT)
