"""How an op is measured: the correctness gate, turns on fresh inputs, clocks and peaks of memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tppo_kernels.testing import close

from benchmarks.results import Result, summarise

Outputs = Sequence[Tensor]
Run = Callable[[], Outputs]
SLOW = 1.0
"""Seconds of a call above which a provider takes at most 3 turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison: providers that compute the same tensors."""

    family: str
    """What is computed, without its sizes."""
    sizes: dict[str, int]
    """Axis -> size."""
    baseline: str
    """The provider that ratios refer to."""
    providers: Mapping[str, Run | str]
    """Each call computes outputs and gradients from the case's inputs; or why it cannot."""
    truth: Callable[[], tuple[Outputs, Outputs]]
    """(eager's outputs in the case's precision, the fp64 truth), for the gate."""
    refresh: Callable[[int], None]
    """Overwrites the inputs with others, drawn from a seed."""
    ideal_seconds: float | None = None
    """The time at the measured ceiling of the device, where one is known."""

    @property
    def name(self) -> str:
        return f"{self.family}: {', '.join(f'{size:,} {axis}' for axis, size in self.sizes.items())}"

    @property
    def runs(self) -> dict[str, Run]:
        return {name: run for name, run in self.providers.items() if not isinstance(run, str)}


class Meter(Protocol):
    """Clock and memory of one device."""

    def calls(self, seconds: float) -> int:
        """How often one timing calls what takes so many seconds."""
        ...

    def time(self, run: Run, calls: int = 1) -> float:
        """Seconds a call."""
        ...

    def peak(self, run: Run) -> tuple[int, int | None]:
        """Bytes of (host, device) that one call held beyond its inputs, its results included."""
        ...


class CpuMeter:
    """Wall clock, and the process's peak resident memory (Linux; elsewhere how far its highest peak rose)."""

    def calls(self, seconds: float) -> int:
        return min(max(int(0.05 / seconds), 1), 1000)  # short calls are repeated

    def time(self, run: Run, calls: int = 1) -> float:
        gc.collect()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def peak(self, run: Run) -> tuple[int, int | None]:
        return host_peak(run)[1], None


T = TypeVar("T")


def host_peak(run: Callable[[], T]) -> tuple[T, int]:
    """What ``run`` returned, and how far resident memory rose above where it was before, in bytes."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
    before = _resident()
    kept = run()
    return kept, max(_highest() - before, 0)


def _resident() -> int:
    return _status("VmRSS") if sys.platform == "linux" else _highest()


def _highest() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class GpuMeter:
    """CUDA events with a flushed L2, and the allocator's peak.

    The device first sleeps some milliseconds, in which the host queues what is timed: short ops are not charged for Python's
    launches, as they are not in a loop that never waits for the device. Who launches for longer, or waits, still pays.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def calls(self, seconds: float) -> int:
        del seconds
        return 1

    def time(self, run: Run, calls: int = 1) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(8_000_000)  # cycles
        start.record()
        kept = [run() for _ in range(calls)]
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3 / calls

    def peak(self, run: Run) -> tuple[int, int | None]:
        run()  # compiles and tunes
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept, host = host_peak(run)
        del kept
        torch.cuda.synchronize()
        return host, torch.cuda.max_memory_allocated() - before


def gate(case: Case) -> dict[str, str | None]:
    """For each provider None, or why its results are not correct.

    tppo_fast is held to the tolerance rule of ``tppo_kernels.testing``; the others, which may have rules of their own, to three
    times eager's error plus 1e-3, in norm.
    """
    eager, truth = case.truth()
    problems: dict[str, str | None] = {}
    for name, run in case.runs.items():
        try:
            check = close if name.startswith("tppo_fast") else _roughly_close
            found = [check(a, e, t) for a, e, t in zip(run(), eager, truth, strict=True)]
            problems[name] = next((f"it disagrees: {problem}" for problem in found if problem), None)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return problems


def _roughly_close(actual: Tensor, eager: Tensor, truth: Tensor) -> str | None:
    size = truth.norm().clamp_min(1e-12)
    error, allowed = ((x.double() - truth).norm() / size for x in (actual, eager))
    return None if error <= 3 * allowed + 1e-3 else f"off by {error:.1e} of the norm, and eager by {allowed:.1e}"


def measure(
    case: Case, meter: Meter, rounds: int, problems: dict[str, str | None] | None = None, *, seed: int = 0
) -> list[Result]:
    """Gate, warm up, take turns; every round has fresh inputs, and the order rotates so that none always follows the same one.

    ``problems`` is the gate's verdict where it was reached before, on fewer rows.
    """
    problems = gate(case) if problems is None else problems
    rows = {
        name: Result(
            case=case.name, provider=name, family=case.family, sizes=case.sizes, baseline=name == case.baseline,
            problem=run if isinstance(run, str) else problems.get(name, "it was not in the gate"),
        )
        for name, run in case.providers.items()
    }  # fmt: skip
    gc.collect()
    gc.freeze()  # what the peers' imports made is not looked through again before every turn
    try:
        _take_turns(case, rows, meter, rounds, seed)
    finally:
        gc.unfreeze()
    results = list(rows.values())
    summarise(results)
    for row in results:
        if case.ideal_seconds and row.median:
            row.share_of_ceiling = case.ideal_seconds / row.median
    return results


def _take_turns(case: Case, rows: Mapping[str, Result], meter: Meter, rounds: int, seed: int) -> None:
    """Warm up and time every provider without a problem; fills in its row."""
    calls: dict[str, int] = {}
    turns: dict[str, int] = {}
    for name, run in case.runs.items():
        if rows[name].problem is None:
            try:
                began = time.perf_counter()
                rows[name].host_peak_bytes, rows[name].device_peak_bytes = meter.peak(run)  # which also warms up
                took = time.perf_counter() - began
                calls[name] = meter.calls(took if took > 0.2 else meter.time(run))
                turns[name] = min(rounds, 3) if took > SLOW else rounds
            except Exception as error:  # out of memory, most likely: the others go on
                rows[name].problem = _short(error)
    for k in range(rounds):
        case.refresh(seed + 1 + k)
        for name in from_place(list(calls), k):
            if k >= turns[name] or rows[name].problem:
                continue
            try:
                rows[name].values.append(meter.time(case.runs[name], calls[name]))
            except Exception as error:  # it ran once; the others go on
                rows[name].problem, rows[name].values = _short(error), []


def from_place(items: Sequence[T], number: int) -> list[T]:
    """All of them, from place ``number`` on and around: who begins in round ``number``, so that nobody always comes first."""
    first = number % max(len(items), 1)
    return [*items[first:], *items[:first]]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device can do, measured."""

    copy: float
    """Bytes per second of a copy, reads and writes counted."""
    gemm: float
    """FLOP per second of a GEMM on random data."""
    description: dict[str, float] = field(default_factory=dict)
    """The same in TB/s and TFLOP/s, for the record."""


def ceilings(device: str, dtype: torch.dtype, meter: Meter, *, size: int, side: int) -> Ceilings:
    """By a copy of ``size`` bytes and a GEMM of [side, side] matrices; the best of five."""
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = 2 * size / _best(lambda: [target.copy_(source)], meter)
    gemm = 2 * side**3 / _best(lambda: [a @ b], meter)
    return Ceilings(copy=copy, gemm=gemm, description={"copy_tb_s": copy / 1e12, "gemm_tflop_s": gemm / 1e12})


def _best(run: Run, meter: Meter, rounds: int = 5) -> float:
    calls = meter.calls(meter.time(run))
    return min(meter.time(run, calls) for _ in range(rounds))
